#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = tags)]
struct Tagged {
    tags: Vec<String>,
}

fn main() {}
