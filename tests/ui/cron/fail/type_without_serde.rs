#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
#[derive(Event, Default)]
struct MorningTick;

fn main() {}
