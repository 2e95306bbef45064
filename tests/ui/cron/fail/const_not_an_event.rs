#![allow(unused)]

use nexus::prelude::*;

#[cron("@hourly")]
const LIMIT: u32 = 5;

fn main() {}
