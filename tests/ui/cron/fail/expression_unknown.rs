#![allow(unused)]

use nexus::prelude::*;

#[cron("@dayly")]
async fn cleanup() {}

#[cron("@reboot")]
async fn cleanup1() {}

fn main() {}
