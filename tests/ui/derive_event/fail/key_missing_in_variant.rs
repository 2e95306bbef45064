#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = id)]
enum Order {
    Placed { id: u64 },
    Lost,
}

fn main() {}
