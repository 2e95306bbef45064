#![allow(unused)]

use nexus::prelude::*;

#[cron(tz = "UTC", "@daily")]
async fn cleanup() {}

fn main() {}
