#![allow(unused)]

use nexus::prelude::*;

#[cron("0 22-2 * * *")]
async fn cleanup() {}

fn main() {}
