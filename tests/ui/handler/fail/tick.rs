#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(event: UserCreated, tick: Tick, at: nexus::Tick) {}

#[handler]
async fn greet_again(tick: Tick) {}

fn main() {}
