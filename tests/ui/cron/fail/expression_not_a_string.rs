#![allow(unused)]

use nexus::prelude::*;

#[cron(5)]
async fn cleanup() {}

#[cron(EVERY_HOUR)]
async fn cleanup1() {}

#[cron(concat!("@", "daily"))]
async fn cleanup2() {}

fn main() {}
