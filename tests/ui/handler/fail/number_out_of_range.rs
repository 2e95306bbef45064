#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(max_attempts = 0)]
async fn greet(event: UserCreated) {}

#[handler(max_attempts = -1)]
async fn greet_again(event: UserCreated) {}

#[handler(concurrency = 5_000_000_000)]
async fn greet_again2(event: UserCreated) {}

fn main() {}
