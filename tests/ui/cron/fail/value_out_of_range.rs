#![allow(unused)]

use nexus::prelude::*;

#[cron("61 * * * *")]
async fn cleanup() {}

#[cron("0 5-40 * * *")]
async fn cleanup1() {}

#[cron("0 9 * * MONDAY")]
async fn cleanup2() {}

fn main() {}
