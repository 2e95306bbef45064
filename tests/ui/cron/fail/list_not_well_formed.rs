#![allow(unused)]

use nexus::prelude::*;

#[cron("*,5 * * * *")]
async fn cleanup() {}

#[cron("1,,2 * * * *")]
async fn cleanup1() {}

fn main() {}
