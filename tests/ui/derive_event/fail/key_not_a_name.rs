#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = user.id)]
struct UserCreated {
    user: u64,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = 2)]
struct UserDeleted(u64, u64);

fn main() {}
