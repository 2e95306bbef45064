#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    #[event(key)]
    user_id: u64,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserDeleted(#[event(key)] u64);

#[derive(Serialize, Deserialize, JsonSchema, Event)]
enum Order {
    #[event(type = "order.placed")]
    Placed,
}

fn main() {}
