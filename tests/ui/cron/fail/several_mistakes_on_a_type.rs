#![allow(unused)]

use nexus::prelude::*;

#[cron("61 * * * *", tz = "Europe/Berln", name = "Morning", group = "billing", grace = 5, formerly = 7)]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

fn main() {}
