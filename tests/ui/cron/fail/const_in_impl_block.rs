#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Digest;

impl Digest {
    #[cron("@hourly")]
    const HOURLY: Self = Self;
}

fn main() {}
