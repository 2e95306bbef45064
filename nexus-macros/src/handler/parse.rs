//! The function and the options, as they were written.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use syn::{
    Attribute, LitStr, Signature, Visibility,
    parse::{Parse, ParseStream, Parser},
};

use crate::{attr::Arguments, diagnostics::Diagnostics, duration::Backoff};

/// Counts are stored as Postgres `integer`.
const COUNTS: std::ops::RangeInclusive<u32> = 1..=i32::MAX.cast_unsigned();

/// A function up to its body, which no macro needs to understand.
pub(crate) struct Function {
    /// How the attribute is written: `#[handler]`.
    pub(crate) attribute: &'static str,
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) visibility: Visibility,
    pub(crate) signature: Signature,
}

impl Function {
    pub(crate) fn parse(item: TokenStream, attribute: &'static str) -> syn::Result<Self> {
        let parse = |input: ParseStream<'_>| {
            let attributes = input.call(Attribute::parse_outer)?;
            let visibility: Visibility = input.parse()?;
            let at = input.span();
            // Half a signature is rustc's to report; anything else is no function.
            let is_function = starts_function(&input.fork());
            let signature = Signature::parse(input).map_err(|error| {
                if is_function {
                    error
                } else {
                    syn::Error::new(at, not_a_function(attribute))
                }
            })?;
            input.parse::<TokenStream>()?;
            Ok(Self {
                attribute,
                attributes,
                visibility,
                signature,
            })
        };
        parse.parse2(item)
    }
}

/// What is said of an item that is no function.
pub(crate) fn not_a_function(attribute: &str) -> String {
    format!("`{attribute}` goes on an `async fn`")
}

/// Whether `fn` comes after the words that may stand before it.
fn starts_function(input: ParseStream<'_>) -> bool {
    let before_fn = |input: ParseStream<'_>| -> syn::Result<()> {
        input.parse::<Option<syn::Token![const]>>()?;
        input.parse::<Option<syn::Token![async]>>()?;
        input.parse::<Option<syn::Token![unsafe]>>()?;
        input.parse::<Option<syn::Abi>>()?;
        input.parse::<syn::Token![fn]>()?;
        Ok(())
    };
    before_fn(input).is_ok()
}

/// The options that `#[handler]` and `#[cron]` share.
#[derive(Default)]
pub(crate) struct HandlerArguments {
    pub(crate) name: Option<LitStr>,
    pub(crate) formerly: Vec<LitStr>,
    pub(crate) group: Option<LitStr>,
    pub(crate) from: Option<LitStr>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) backoff: Option<Backoff>,
    pub(crate) timeout: Option<(Span, Duration)>,
    pub(crate) concurrency: Option<u32>,
}

impl HandlerArguments {
    pub(crate) fn take(arguments: &mut Arguments, diagnostics: &mut Diagnostics) -> Self {
        Self {
            name: arguments.text("name", diagnostics),
            formerly: arguments.texts("formerly", diagnostics),
            group: arguments.text("group", diagnostics),
            from: arguments.text("from", diagnostics),
            max_attempts: arguments.number("max_attempts", COUNTS, diagnostics),
            backoff: arguments.backoff("backoff", diagnostics),
            timeout: arguments.duration("timeout", diagnostics),
            concurrency: arguments.number("concurrency", COUNTS, diagnostics),
        }
    }
}
