#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", group = "billing", max_attempts = 3, timeout = "30s")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct MorningTick;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Digest;

#[cron("@hourly", backoff = "fixed(1s)", concurrency = 4, key = id, type = "a.b", version = 2)]
const HOURLY: Digest = Digest;

#[cron("@hourly", nane = "often")]
const OFTEN: Digest = Digest;

fn main() {}
