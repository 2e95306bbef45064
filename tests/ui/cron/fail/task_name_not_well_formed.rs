#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", name = "Morning-Tick")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

#[cron("@daily")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
#[event(type = "tick.breakfast")]
struct Frühstück;

#[cron("@daily", name = "")]
const EMPTY: MorningTick = MorningTick;

fn main() {}
