//! `#[handler]`, and what it shares with `#[cron]`: a function that a descriptor is made for.

mod check;
mod expand;
mod model;
mod parse;

use proc_macro2::TokenStream;

pub(crate) use check::check;
pub(crate) use expand::expand;
pub(crate) use model::{Schedule, Trigger};
pub(crate) use parse::{Function, HandlerArguments};

use crate::{
    attr::{Accepted, Arguments},
    diagnostics::{Diagnostics, error_beside},
};

static ACCEPTED: Accepted = Accepted {
    attribute: "#[handler]",
    options: &[
        ("group", "\"billing\""),
        ("name", "\"send_welcome\""),
        ("max_attempts", "5"),
        ("backoff", "\"exponential(1s..10m)\""),
        ("timeout", "\"30s\""),
        ("concurrency", "16"),
    ],
    hints: &[
        ("tz", "time zones belong to `#[cron]`"),
        ("event", "the event is the first argument of the function"),
        ("key", "a key belongs to the event: `#[event(key = field)]`"),
    ],
    leading_text: false,
};

pub(crate) fn handler(arguments: TokenStream, item: &TokenStream) -> TokenStream {
    let mut diagnostics = Diagnostics::default();
    let mut arguments = Arguments::parse(arguments, &ACCEPTED, &mut diagnostics);
    let options = HandlerArguments::take(&mut arguments, &mut diagnostics);
    let model = diagnostics
        .check(Function::parse(item.clone(), ACCEPTED.attribute))
        .and_then(|function| check(&function, options, Some(Trigger::Event), &mut diagnostics));
    match diagnostics.finish(model) {
        Ok(model) => model.map(|model| expand(item, &model)).unwrap_or_default(),
        Err(error) => error_beside(item, &error),
    }
}
