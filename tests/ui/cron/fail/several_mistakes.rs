#![allow(unused)]

use nexus::prelude::*;

#[cron("61 * * * *", tz = "Europe/Berln", name = "clean up", timeout = "5")]
fn cleanup(tx: Tx) {}

fn main() {}
