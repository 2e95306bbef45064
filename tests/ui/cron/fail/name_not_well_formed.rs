#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", name = "clean-up")]
async fn cleanup() {}

fn main() {}
