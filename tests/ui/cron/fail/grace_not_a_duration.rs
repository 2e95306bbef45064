#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", grace = 60)]
async fn cleanup() {}

#[cron("@daily", grace = "0s")]
async fn cleanup1() {}

fn main() {}
