#![allow(unused)]

use nexus::prelude::*;

#[cron("*/ * * * *")]
async fn cleanup() {}

#[cron("/5 * * * *")]
async fn cleanup1() {}

fn main() {}
