#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(timeout = "30")]
async fn greet(event: UserCreated) {}

#[handler(timeout = 30)]
async fn greet_again(event: UserCreated) {}

fn main() {}
