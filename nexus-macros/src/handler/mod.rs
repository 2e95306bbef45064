//! `#[handler]`, and what it shares with `#[cron]`: a function that a descriptor is made for.

mod check;
mod expand;
mod model;
mod parse;

use proc_macro2::TokenStream;

pub(crate) use check::{
    check, check_formerly, check_options, concerns_descriptor, names_self, without_registrations,
};
use expand::expand;
pub(crate) use expand::{expand_cron, hidden_const, schedule_expression};
pub(crate) use model::{Registration, Schedule, Trigger};
pub(crate) use parse::{Function, HandlerArguments, not_a_function};

use crate::{
    attr::{Accepted, Arguments},
    diagnostics::{Diagnostics, error_beside},
};

static ACCEPTED: Accepted = Accepted {
    attribute: "#[handler]",
    options: &[
        ("group", "\"billing\""),
        ("name", "\"send_welcome\""),
        ("formerly", "\"greet\""),
        ("from", "\"beginning\""),
        ("max_attempts", "5"),
        ("backoff", "\"exponential(1s..10m)\""),
        ("timeout", "\"30s\""),
        ("concurrency", "16"),
    ],
    hints: &[
        ("tz", "time zones belong to `#[cron]`"),
        ("misfire", "due times belong to `#[cron]`"),
        ("grace", "due times belong to `#[cron]`"),
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
        .and_then(|function| {
            let callable = check(&function, true, &mut diagnostics);
            let trigger = Some(Trigger::Event);
            let registration = check_options(&function, options, trigger, &mut diagnostics)?;
            Some((callable, registration))
        });
    match diagnostics.finish(model) {
        Ok(model) => model
            .map(|(callable, registration)| expand(item, &callable, &registration))
            .unwrap_or_default(),
        Err(error) => error_beside(&without_registrations(item), &error),
    }
}
