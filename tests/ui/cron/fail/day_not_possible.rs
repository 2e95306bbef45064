#![allow(unused)]

use nexus::prelude::*;

#[cron("0 0 * * L")]
async fn cleanup() {}

#[cron("0 0 * * FRI#6")]
async fn cleanup1() {}

#[cron("0 0 32W * *")]
async fn cleanup2() {}

fn main() {}
