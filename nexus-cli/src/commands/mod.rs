//! The commands, a module for each: its arguments, what it does, and how that is shown, to people and as JSON.

pub(crate) mod bench;
pub(crate) mod dead_letters;
pub(crate) mod doctor;
pub(crate) mod emit;
pub(crate) mod events;
pub(crate) mod groups;
pub(crate) mod handlers;
pub(crate) mod migrate;
pub(crate) mod nodes;
pub(crate) mod replay;
pub(crate) mod schedules;
pub(crate) mod schemas;
pub(crate) mod serve;
pub(crate) mod sql;
pub(crate) mod status;
pub(crate) mod tokens;

use std::io::Read as _;

use anyhow::Context as _;
use serde_json::Value;

use crate::failure::usage;

/// A payload as it is given: JSON, or `-` for standard input.
fn payload(given: &str) -> anyhow::Result<Value> {
    let mut text = given.to_owned();
    if given == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("could not read the payload from standard input")?;
    }
    serde_json::from_str(&text)
        .map_err(|error| usage(format!("the payload is not valid JSON: {error}")))
}

/// `1 message`, `2 messages`.
fn count(number: u64, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}
