#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily", misfire = "once")]
async fn cleanup() {}

#[cron("@daily", misfire = "fire_all")]
async fn cleanup1() {}

#[cron("@daily", misfire = fire_all(0))]
async fn cleanup2() {}

#[cron("@daily", misfire = "fire_all(many)")]
async fn cleanup3() {}

#[cron("@daily", misfire = "fire_all(5000)")]
async fn cleanup4() {}

#[cron("@daily", misfire = "skip(3)")]
async fn cleanup5() {}

#[cron("@daily", misfire = "tomorrow")]
async fn cleanup6() {}

fn main() {}
