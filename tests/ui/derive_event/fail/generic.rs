#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Page<T> {
    items: Vec<T>,
}

fn main() {}
