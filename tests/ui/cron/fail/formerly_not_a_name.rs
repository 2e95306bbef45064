#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", formerly = "clean-up")]
async fn cleanup() {}

#[cron("@daily", formerly = ["evening_tick", "morning_tick", "evening_tick"])]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

fn main() {}
