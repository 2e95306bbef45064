#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(max_atempts = 3)]
async fn greet(event: UserCreated) {}

#[handler(retries = 3)]
async fn greet_again(event: UserCreated) {}

#[handler(tz = "Europe/Berlin")]
async fn greet_again2(event: UserCreated) {}

#[handler(colour = "red")]
async fn greet_again3(event: UserCreated) {}

fn main() {}
