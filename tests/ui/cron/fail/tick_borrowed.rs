#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
async fn cleanup(tick: &Tick) {}

fn main() {}
