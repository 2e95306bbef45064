#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
struct Cleanup;

#[cron("@daily")]
#[derive(Default, Serialize, Deserialize, JsonSchema)]
struct CleanupToo;

fn main() {}
