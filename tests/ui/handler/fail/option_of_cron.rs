#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(misfire = "skip", grace = "60s")]
async fn greet(event: UserCreated) {}

fn main() {}
