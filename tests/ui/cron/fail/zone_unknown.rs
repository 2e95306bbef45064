#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", tz = "Europe/Berln")]
async fn cleanup() {}

#[cron("@daily", tz = "europe/berlin")]
async fn cleanup1() {}

#[cron("@daily", tz = "+02:00")]
async fn cleanup2() {}

fn main() {}
