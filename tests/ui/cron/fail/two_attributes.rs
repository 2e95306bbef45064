#![allow(unused)]

use nexus::prelude::*;

#[cron("0 9 * * *")]
#[cron("0 18 * * *")]
async fn cleanup() {}

fn main() {}
