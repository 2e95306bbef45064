#![allow(unused)]

use nexus::prelude::*;

#[cron]
async fn cleanup() {}

#[cron()]
async fn cleanup1() {}

#[cron(tz = "UTC")]
async fn cleanup2() {}

fn main() {}
