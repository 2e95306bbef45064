#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = "user_id")]
struct UserCreated {
    user_id: u64,
}

fn main() {}
