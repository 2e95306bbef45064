#![allow(unused)]

use nexus::prelude::*;

#[cron(schedule = "@daily")]
async fn cleanup() {}

fn main() {}
