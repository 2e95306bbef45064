//! The rules of `#[derive(Event)]`.

use syn::{Data, DeriveInput, Fields, LitStr, Member, ext::IdentExt, spanned::Spanned};

use super::{
    model::{Event, Key},
    parse::EventAttribute,
};
use crate::{
    attr::is_macro,
    diagnostics::{Diagnostics, closest, did_you_mean},
    name,
};

/// What was meant. After a mistake, which is reported, the result is not to be used.
pub(super) fn check(
    input: &DeriveInput,
    attribute: EventAttribute,
    diagnostics: &mut Diagnostics,
) -> Event {
    // Above a `#[cron]` that says so itself.
    let under_cron = input
        .attrs
        .iter()
        .any(|attribute| is_macro(attribute, "cron"));
    if let Data::Union(data) = &input.data
        && !under_cron
    {
        diagnostics.error(
            data.union_token.span,
            "an event cannot be a union; use a struct or an enum",
        );
    }
    if !input.generics.params.is_empty() && !under_cron {
        diagnostics.error_over(
            &input.generics,
            "an event cannot be generic: one event type stands for exactly one JSON Schema\nderive `Event` for a struct that holds the concrete type",
        );
    }
    Event {
        ident: input.ident.clone(),
        event_type: event_type(input, &attribute, diagnostics),
        declared_at: attribute
            .event_type
            .as_ref()
            .map_or_else(|| input.ident.span(), LitStr::span),
        version: attribute.version.unwrap_or(1),
        key: attribute
            .key
            .and_then(|member| key(input, member, diagnostics)),
        register: attribute.register.unwrap_or(true),
    }
}

/// Whether the type has one schema at all.
pub(super) fn can_be_event(input: &DeriveInput) -> bool {
    !matches!(input.data, Data::Union(_)) && input.generics.params.is_empty()
}

fn event_type(
    input: &DeriveInput,
    attribute: &EventAttribute,
    diagnostics: &mut Diagnostics,
) -> String {
    let Some(literal) = &attribute.event_type else {
        let type_name = input.ident.unraw().to_string();
        return name::event_type_of(&type_name).unwrap_or_else(|| {
            // A `type = …` that is wrong in another way was reported already.
            if diagnostics.is_empty() {
                diagnostics.error(
                    input.ident.span(),
                    format!("no event type can be made from the name `{type_name}`; write `#[event(type = \"…\")]`"),
                );
            }
            String::new()
        });
    };
    let event_type = literal.value();
    if event_type.is_empty() {
        diagnostics.error(
            literal.span(),
            "the event type is empty; write something like `user.created`",
        );
    } else if !name::is_event_type(&event_type) {
        diagnostics.error(
            literal.span(),
            format!(
                "event type `{event_type}` is not well formed{}\nwords of `a-z` and `0-9`, joined by single `_`, in segments joined by `.`, each starting with a letter; at most 100 bytes",
                did_you_mean(name::meant_event_type(&event_type))
            ),
        );
    }
    event_type
}

fn key(input: &DeriveInput, member: Member, diagnostics: &mut Diagnostics) -> Option<Key> {
    match &input.data {
        Data::Struct(data) => {
            if !has(&data.fields, &member) {
                let owner = format!("struct `{}`", input.ident);
                diagnostics.error(member.span(), no_such_field(&owner, &data.fields, &member));
                return None;
            }
            Some(Key {
                member,
                variants: None,
            })
        }
        Data::Enum(data) => {
            if let Some(without) = data.variants.iter().find(|v| !has(&v.fields, &member)) {
                let owner = format!("variant `{}`", without.ident);
                diagnostics.error(
                    member.span(),
                    format!(
                        "{}\nthe key of an enum must be a field of every variant",
                        no_such_field(&owner, &without.fields, &member)
                    ),
                );
                return None;
            }
            let variants = data
                .variants
                .iter()
                .map(|variant| variant.ident.clone())
                .collect();
            Some(Key {
                member,
                variants: Some(variants),
            })
        }
        Data::Union(_) => None,
    }
}

fn has(fields: &Fields, member: &Member) -> bool {
    fields.members().any(|known| known == *member)
}

fn no_such_field(owner: &str, fields: &Fields, member: &Member) -> String {
    let text = |member: &Member| match member {
        Member::Named(name) => name.to_string(),
        Member::Unnamed(index) => index.index.to_string(),
    };
    let known: Vec<String> = fields.members().map(|known| text(&known)).collect();
    let member = text(member);
    let meant = closest(&member, known.iter().map(String::as_str));
    let known = match &*known {
        [] => "it has no fields".to_owned(),
        known => format!("its fields: `{}`", known.join("`, `")),
    };
    format!(
        "{owner} has no field `{member}`{}\n{known}",
        did_you_mean(meant)
    )
}
