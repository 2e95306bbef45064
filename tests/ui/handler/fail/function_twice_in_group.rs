#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(group = "billing")]
async fn greet(event: UserCreated) {}

#[handler(group = "billing")]
async fn greet(event: UserCreated) {}

fn main() {}
