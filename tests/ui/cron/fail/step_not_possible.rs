#![allow(unused)]

use nexus::prelude::*;

#[cron("0/5 * * * *")]
async fn cleanup() {}

#[cron("*/90 * * * *")]
async fn cleanup1() {}

#[cron("*/0 * * * *")]
async fn cleanup2() {}

fn main() {}
