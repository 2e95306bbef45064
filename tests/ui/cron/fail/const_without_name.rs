#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Digest;

#[cron("@hourly")]
const _: Digest = Digest;

fn main() {}
