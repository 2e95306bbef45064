#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
struct Cleanup;

fn main() {}
