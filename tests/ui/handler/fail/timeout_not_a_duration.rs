#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(timeout = "1.5s")]
async fn greet(event: UserCreated) {}

#[handler(timeout = "30sec")]
async fn greet_again(event: UserCreated) {}

#[handler(timeout = "30s 1m")]
async fn greet_again2(event: UserCreated) {}

#[handler(timeout = "0s")]
async fn greet_again3(event: UserCreated) {}

#[handler(timeout = "30d")]
async fn greet_again4(event: UserCreated) {}

#[handler(timeout = "")]
async fn greet_again5(event: UserCreated) {}

fn main() {}

mod more {
    use super::UserCreated;

    #[nexus::handler(timeout = "5 weeks")]
    async fn greet6(event: UserCreated) {}

    #[nexus::handler(timeout = "366d")]
    async fn greet7(event: UserCreated) {}
}
