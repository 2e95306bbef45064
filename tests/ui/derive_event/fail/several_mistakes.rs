#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "User.Created", version = -1, key = id, group = "billing")]
struct UserCreated {
    user_id: u64,
}

fn main() {}
