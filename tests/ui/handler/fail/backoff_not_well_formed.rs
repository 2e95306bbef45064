#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(backoff = "exponential(10m..1s)")]
async fn greet(event: UserCreated) {}

#[handler(backoff = "linear(1s..10m)")]
async fn greet_again(event: UserCreated) {}

#[handler(backoff = "5s")]
async fn greet_again2(event: UserCreated) {}

#[handler(backoff = "exponential(1..10m)")]
async fn greet_again3(event: UserCreated) {}

#[handler(backoff = "fixed")]
async fn greet_again4(event: UserCreated) {}

fn main() {}

mod more {
    use super::UserCreated;

    #[nexus::handler(backoff = "exponential(1s)")]
    async fn greet5(event: UserCreated) {}

    #[nexus::handler(backoff = "exponential(1s..=10m)")]
    async fn greet6(event: UserCreated) {}

    #[nexus::handler(backoff = "fixed(1s..10m)")]
    async fn greet7(event: UserCreated) {}

    #[nexus::handler(backoff = "exponental(1s..10m)")]
    async fn greet8(event: UserCreated) {}
}
