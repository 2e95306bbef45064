#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = user)]
struct UserCreated {
    user_id: u64,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = id)]
struct Ping;

fn main() {}
