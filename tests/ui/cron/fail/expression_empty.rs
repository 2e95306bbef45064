#![allow(unused)]

use nexus::prelude::*;

#[cron("")]
async fn cleanup() {}

fn main() {}
