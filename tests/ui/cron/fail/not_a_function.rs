#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
mod cleanup {}

#[cron("@daily")]
type Cleanup = u8;

fn main() {}
