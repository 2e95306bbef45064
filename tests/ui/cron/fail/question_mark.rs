#![allow(unused)]

use nexus::prelude::*;

#[cron("0 0 ? * MON")]
async fn cleanup() {}

fn main() {}
