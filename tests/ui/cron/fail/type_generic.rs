#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
struct Above<T> {
    items: Vec<T>,
}

#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
#[cron("@daily")]
struct Below<T> {
    items: Vec<T>,
}

#[cron("@daily")]
struct WithoutDerive<T>(T);

fn main() {}
