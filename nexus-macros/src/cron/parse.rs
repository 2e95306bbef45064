//! What `#[cron(…)]` says besides the options of a handler: when, and in which time zone.

use std::ops::Range;

use proc_macro2::Span;
use syn::LitStr;

use super::{expression, zone};
use crate::{
    attr::{Accepted, Arguments},
    diagnostics::Diagnostics,
    handler::Schedule,
};

const EXPRESSION_FIRST: &str =
    "the cron expression comes first, without a name: `#[cron(\"*/5 * * * *\")]`";

pub(super) static ACCEPTED: Accepted = Accepted {
    attribute: "#[cron]",
    options: &[
        ("tz", "\"Europe/Berlin\""),
        ("name", "\"cleanup\""),
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
    ],
    leading_text: true,
};

/// The schedule, if it can be one; else the reason is reported.
pub(super) fn schedule(
    arguments: &mut Arguments,
    diagnostics: &mut Diagnostics,
) -> Option<Schedule> {
    let expression = if let Some(literal) = arguments.leading.take() {
        check_expression(&literal, diagnostics)
    } else {
        if !arguments.excused {
            diagnostics.error(
                Span::call_site(),
                "`#[cron]` needs its expression: write `#[cron(\"*/5 * * * *\")]` for every five minutes",
            );
        }
        None
    };
    let time_zone = match arguments.text("tz", diagnostics) {
        Some(literal) => match zone::check(&literal.value()) {
            Ok(()) => Some(literal.value()),
            Err(reason) => {
                diagnostics.error(literal.span(), reason);
                None
            }
        },
        None => None,
    };
    Some(Schedule {
        expression: expression?,
        time_zone,
    })
}

fn check_expression(literal: &LitStr, diagnostics: &mut Diagnostics) -> Option<String> {
    let text = literal.value();
    match expression::check(&text) {
        Ok(()) => Some(text.trim().to_owned()),
        Err(mistake) => {
            let span = span_within(literal, &text, mistake.at.clone());
            diagnostics.error(span, mistake.display_in(&text));
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
