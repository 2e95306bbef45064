#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", timezone = "UTC")]
async fn cleanup() {}

fn main() {}
