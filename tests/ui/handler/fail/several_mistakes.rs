#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(max_atempts = 3, timeout = "30", concurrency = 0)]
fn greet(event: &UserCreated, tx: Tx) {}

fn main() {}
