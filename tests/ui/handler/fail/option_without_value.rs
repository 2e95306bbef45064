#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(timeout)]
async fn greet(event: UserCreated) {}

#[handler(group =)]
async fn greet_again(event: UserCreated) {}

fn main() {}
