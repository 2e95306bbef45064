#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(formerly = "send mail")]
async fn greet(event: UserCreated) {}

#[handler(formerly = ["greet_again", "welcome", "welcome"])]
async fn greet_again(event: UserCreated) {}

#[handler(formerly = welcome)]
async fn greet2(event: UserCreated) {}

#[handler(formerly = ["welcome2", 5])]
async fn greet3(event: UserCreated) {}

#[handler(formerly = [])]
async fn greet4(event: UserCreated) {}

fn main() {}
