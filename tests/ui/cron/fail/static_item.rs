#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Digest;

#[cron("@hourly")]
static HOURLY: Digest = Digest;

#[cron("@hourly")]
static mut DAILY: Digest = Digest;

fn main() {}
