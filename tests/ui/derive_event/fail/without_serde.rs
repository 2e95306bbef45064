#![allow(unused)]

use nexus::prelude::*;

#[derive(JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

fn main() {}
