#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(max_attempts = 3, group = "billing", max_attempts = 5)]
async fn greet(event: UserCreated) {}

fn main() {}
