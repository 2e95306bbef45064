#![allow(unused)]

use nexus::prelude::*;

#[cron("0 0 30 2 *")]
async fn cleanup() {}

fn main() {}
