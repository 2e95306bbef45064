#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
#[handler]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

fn main() {}
