#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(group = billing)]
async fn greet(event: UserCreated) {}

#[handler(name = 5)]
async fn greet_again(event: UserCreated) {}

fn main() {}
