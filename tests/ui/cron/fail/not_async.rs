#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
fn cleanup() {}

fn main() {}
