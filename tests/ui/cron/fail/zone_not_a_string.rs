#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", tz = UTC)]
async fn cleanup() {}

fn main() {}
