#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct MorningTick {
    hour: u8,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[cron("@daily")]
struct EveningTick;

fn main() {}
