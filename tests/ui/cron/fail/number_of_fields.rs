#![allow(unused)]

use nexus::prelude::*;

#[cron("* * *")]
async fn cleanup() {}

#[cron("0 0 0 1 1 * 2030")]
async fn cleanup1() {}

fn main() {}
