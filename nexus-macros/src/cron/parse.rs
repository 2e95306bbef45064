//! What `#[cron(…)]` says: when, in which time zone, and on what it stands.

use std::ops::Range;

use proc_macro2::{Ident, Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::{
    Attribute, Generics, LitStr, Meta, Token, Type, Visibility,
    ext::IdentExt,
    parse::{ParseStream, Parser},
};

use nexus_cron::{check_expression, check_time_zone};

use crate::{
    attr::{Accepted, Arguments, is_macro, split_off},
    diagnostics::Diagnostics,
    handler::{Schedule, concerns_descriptor},
};

const EXPRESSION_FIRST: &str =
    "the cron expression comes first, without a name: `#[cron(\"*/5 * * * *\")]`";
const OF_HANDLERS: &str =
    "`#[cron]` only emits the event here: write it in the `#[handler]` of the event";

/// On a function.
pub(super) static FUNCTION: Accepted = Accepted {
    attribute: "#[cron]",
    options: &[
        ("tz", "\"Europe/Berlin\""),
        ("misfire", "\"fire_once\""),
        ("grace", "\"60s\""),
        ("name", "\"cleanup\""),
        ("formerly", "\"clean_up\""),
        ("group", "\"billing\""),
        ("max_attempts", "5"),
        ("backoff", "\"exponential(1s..10m)\""),
        ("timeout", "\"30s\""),
        ("concurrency", "1"),
    ],
    hints: &[
        ("schedule", EXPRESSION_FIRST),
        ("expression", EXPRESSION_FIRST),
        ("expr", EXPRESSION_FIRST),
        ("cron", EXPRESSION_FIRST),
        (
            "from",
            "a scheduled task has no history; `misfire` says what becomes of due times that passed",
        ),
    ],
    leading_text: true,
};

/// On a type or a constant.
pub(super) static EMITS: Accepted = Accepted {
    attribute: "#[cron]",
    options: &[
        ("tz", "\"Europe/Berlin\""),
        ("misfire", "\"fire_once\""),
        ("grace", "\"60s\""),
        ("name", "\"morning\""),
        ("formerly", "\"early_morning\""),
    ],
    hints: &[
        ("schedule", EXPRESSION_FIRST),
        ("expression", EXPRESSION_FIRST),
        ("expr", EXPRESSION_FIRST),
        ("cron", EXPRESSION_FIRST),
        ("from", OF_HANDLERS),
        ("group", OF_HANDLERS),
        ("max_attempts", OF_HANDLERS),
        ("backoff", OF_HANDLERS),
        ("timeout", OF_HANDLERS),
        ("concurrency", OF_HANDLERS),
        ("key", "a key belongs to the event: `#[event(key = field)]`"),
        ("type", "write `#[event(type = \"…\")]` for the event type"),
        ("version", "write `#[event(version = …)]` for the version"),
    ],
    leading_text: true,
};

/// One of the attributes of an item.
pub(super) struct Use {
    pub(super) arguments: TokenStream,
    /// The attribute as it is written; the one that is being expanded is nowhere to be seen.
    attribute: Option<Attribute>,
}

/// Errors that concern the attribute as a whole.
impl ToTokens for Use {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        self.attribute.to_tokens(tokens);
    }
}

/// The attribute that is expanded and those that follow on the item, and the item without them.
pub(super) fn uses(arguments: TokenStream, item: &TokenStream) -> (Vec<Use>, TokenStream) {
    // `#[cron = …]` is refused by rustc, as it is for every macro.
    let (others, item) = split_off(item, |attribute| {
        is_macro(attribute, "cron") && !matches!(attribute.meta, Meta::NameValue(_))
    });
    let first = Use {
        arguments,
        attribute: None,
    };
    let others = others.into_iter().map(|attribute| Use {
        arguments: match &attribute.meta {
            Meta::List(list) => list.tokens.clone(),
            _ => TokenStream::new(),
        },
        attribute: Some(attribute),
    });
    (std::iter::once(first).chain(others).collect(), item)
}

/// A type or a constant, as far as it matters.
pub(super) struct Item {
    pub(super) attributes: Vec<Attribute>,
    pub(super) visibility: Visibility,
    pub(super) ident: Ident,
    pub(super) what: What,
}

/// What stands behind the visibility. `is_event`: the derive is written below `#[cron]`, so that it
/// reads the type as well.
pub(super) enum What {
    Type {
        generics: Generics,
        is_event: bool,
    },
    Union {
        keyword: Token![union],
        is_event: bool,
    },
    Constant {
        ty: Box<Type>,
    },
    Static {
        keyword: Token![static],
    },
}

impl Item {
    /// The item, if it begins like a type or a constant.
    pub(super) fn parse(item: &TokenStream) -> Option<Self> {
        let parse = |input: ParseStream<'_>| {
            let attributes = input.call(Attribute::parse_outer)?;
            let visibility: Visibility = input.parse()?;
            let is_event = attributes.iter().any(derives_event);
            let (ident, what) = if input.peek(Token![struct]) || input.peek(Token![enum]) {
                input.parse::<TokenTree>()?;
                let ident = input.parse()?;
                let generics = input.parse()?;
                (ident, What::Type { generics, is_event })
            } else if input.peek(Token![union]) && input.peek2(syn::Ident::peek_any) {
                let keyword = input.parse()?;
                (input.parse()?, What::Union { keyword, is_event })
            } else if input.peek(Token![static]) {
                let keyword = input.parse()?;
                input.parse::<Option<Token![mut]>>()?;
                (input.parse()?, What::Static { keyword })
            } else {
                // Not the start of a `const fn`.
                input.parse::<Token![const]>()?;
                let ident = input.call(Ident::parse_any)?;
                input.parse::<Token![:]>()?;
                let ty = input.parse()?;
                (ident, What::Constant { ty })
            };
            input.parse::<TokenStream>()?;
            Ok(Self {
                attributes,
                visibility,
                ident,
                what,
            })
        };
        parse.parse2(item.clone()).ok()
    }

    /// The attributes that hold for what is generated as well.
    pub(super) fn descriptor_attributes(&self) -> Vec<Attribute> {
        self.attributes
            .iter()
            .filter(|attribute| concerns_descriptor(attribute))
            .cloned()
            .collect()
    }
}

/// Whether `Event` stands in `#[derive(…)]`.
fn derives_event(attribute: &Attribute) -> bool {
    let Meta::List(list) = &attribute.meta else {
        return false;
    };
    list.path.is_ident("derive")
        && list
            .tokens
            .clone()
            .into_iter()
            .any(|token| matches!(token, TokenTree::Ident(name) if name == "Event"))
}

/// The text for what `#[cron]` cannot stand on names all that it can stand on.
pub(super) fn kinds(error: syn::Error) -> syn::Error {
    if error.to_string() == crate::handler::not_a_function(FUNCTION.attribute) {
        syn::Error::new(
            error.span(),
            "`#[cron]` goes on an `async fn`, which it runs, or on an event type or a constant, which it emits",
        )
    } else {
        error
    }
}

/// The schedule, if it can be one; else the reason is reported.
pub(super) fn schedule(
    arguments: &mut Arguments,
    attribute: &Use,
    diagnostics: &mut Diagnostics,
) -> Option<Schedule> {
    let expression = if let Some(literal) = arguments.leading.take() {
        expression(&literal, diagnostics)
    } else {
        if !arguments.excused {
            diagnostics.error_over(
                attribute,
                "`#[cron]` needs its expression: write `#[cron(\"*/5 * * * *\")]` for every five minutes",
            );
        }
        None
    };
    let time_zone = match arguments.text("tz", diagnostics) {
        Some(literal) => match check_time_zone(&literal.value()) {
            Ok(()) => Some(literal.value()),
            Err(reason) => {
                diagnostics.error(literal.span(), reason);
                None
            }
        },
        None => None,
    };
    let misfire = arguments.misfire("misfire", diagnostics);
    let grace = arguments.duration("grace", diagnostics);
    Some(Schedule {
        expression: expression?,
        time_zone,
        misfire,
        grace: grace.map(|(_, grace)| grace),
    })
}

fn expression(literal: &LitStr, diagnostics: &mut Diagnostics) -> Option<String> {
    let text = literal.value();
    match check_expression(&text) {
        Ok(()) => Some(text.trim().to_owned()),
        Err(mistakes) => {
            for mistake in mistakes {
                let span = span_within(literal, &text, mistake.at.clone());
                diagnostics.error(span, mistake.display_in(&text));
            }
            None
        }
    }
}

/// The part of a literal, where the compiler can say it; today only nightly can.
fn span_within(literal: &LitStr, text: &str, part: Range<usize>) -> Span {
    let token = literal.token();
    let is_plain = token.to_string() == format!("\"{text}\"");
    let part = part.start + 1..part.end + 1;
    is_plain
        .then(|| token.subspan(part))
        .flatten()
        .unwrap_or_else(|| literal.span())
}
