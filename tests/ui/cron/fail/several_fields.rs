#![allow(unused)]

use nexus::prelude::*;

#[cron("61 24 * 13 *")]
async fn cleanup() {}

fn main() {}
