#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", from = "beginning")]
async fn close_day(tick: Tick) {}

fn main() {}
