#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(event: UserCreated) {}

#[handler]
async fn greet(event: UserCreated) {}

fn main() {}
