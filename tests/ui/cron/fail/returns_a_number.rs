#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
async fn cleanup() -> u32 {
    1
}

fn main() {}
