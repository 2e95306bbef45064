#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", name = "cleanup")]
async fn morning() {}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Digest;

#[cron("@hourly")]
const CLEANUP: Digest = Digest;

fn main() {}
