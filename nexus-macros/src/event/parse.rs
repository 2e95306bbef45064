//! `#[event(…)]`, as it was written.

use syn::{Attribute, Data, DeriveInput, Fields, LitStr, Member, Meta};

use crate::{
    attr::{Accepted, Arguments},
    diagnostics::Diagnostics,
};

static ACCEPTED: Accepted = Accepted {
    attribute: "#[event]",
    options: &[
        ("type", "\"user.created\""),
        ("version", "2"),
        ("key", "user_id"),
        ("register", "false"),
    ],
    hints: &[("name", "write `type = \"user.created\"` for the event type")],
    leading_text: false,
};

/// Versions are stored as Postgres `integer`.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=i32::MAX.cast_unsigned();

/// What `#[event(…)]` says; `None` is not said, or said wrongly and reported.
pub(super) struct EventAttribute {
    pub(super) event_type: Option<LitStr>,
    pub(super) version: Option<u32>,
    pub(super) key: Option<Member>,
    pub(super) register: Option<bool>,
}

pub(super) fn parse(input: &DeriveInput, diagnostics: &mut Diagnostics) -> EventAttribute {
    let mut arguments = Arguments::none(&ACCEPTED);
    for attribute in event_attributes(&input.attrs) {
        match &attribute.meta {
            Meta::List(list) => arguments.extend(list.tokens.clone(), diagnostics),
            other => diagnostics.error_over(
                other,
                "`#[event]` takes its options in parentheses: write `#[event(type = \"user.created\")]`",
            ),
        }
    }
    refuse_on_parts(input, diagnostics);
    EventAttribute {
        event_type: arguments.text("type", diagnostics),
        version: arguments.number("version", VERSIONS, diagnostics),
        key: arguments.member("key", diagnostics),
        register: arguments.switch("register", diagnostics),
    }
}

fn event_attributes(attributes: &[Attribute]) -> impl Iterator<Item = &Attribute> {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("event"))
}

/// `#[event]` belongs to the whole type; rustc lets it pass on fields and variants.
fn refuse_on_parts(input: &DeriveInput, diagnostics: &mut Diagnostics) {
    let mut refuse = |attributes: &[Attribute], part: &str, instead: &str| {
        for attribute in event_attributes(attributes) {
            diagnostics.error_over(
                attribute,
                format!("`#[event]` goes on the type, not on a {part}{instead}"),
            );
        }
    };
    let mut refuse_on_fields = |fields: &Fields| {
        for field in fields {
            let instead = field
                .ident
                .as_ref()
                .map(|name| format!("; for a key write `#[event(key = {name})]` above the type"))
                .unwrap_or_default();
            refuse(&field.attrs, "field", &instead);
        }
    };
    match &input.data {
        Data::Struct(data) => refuse_on_fields(&data.fields),
        Data::Enum(data) => {
            for variant in &data.variants {
                refuse_on_fields(&variant.fields);
            }
            for variant in &data.variants {
                refuse(
                    &variant.attrs,
                    "variant",
                    ": all variants are one event type",
                );
            }
        }
        Data::Union(_) => {}
    }
}
