#![allow(unused)]

use nexus::prelude::*;

#[cron("0 9 * * *")]
#[cron("0 18 * * *")]
async fn cleanup() {}

#[cron("0 9 * * *", name = "report")]
#[cron("0 18 * * *", name = "report")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct Report;

fn main() {}
