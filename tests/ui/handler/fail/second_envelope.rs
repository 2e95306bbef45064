#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(event: UserCreated, again: Envelope<UserCreated>, more: &Batch<UserCreated>) {}

#[handler]
async fn greet_again(event: &mut Envelope<UserCreated>) {}

fn main() {}
