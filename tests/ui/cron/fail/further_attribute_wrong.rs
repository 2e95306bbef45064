#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
#[cron]
#[cron("@dayly", name = "often", misfire = "never")]
async fn cleanup() {}

#[cron("@daily")]
#[cron("@hourly", colour = "red", name = "hourly")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

fn main() {}
