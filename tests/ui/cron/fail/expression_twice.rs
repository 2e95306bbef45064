#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", "@hourly")]
async fn cleanup() {}

fn main() {}
