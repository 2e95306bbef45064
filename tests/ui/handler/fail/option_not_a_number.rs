#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(max_attempts = "5")]
async fn greet(event: UserCreated) {}

#[handler(concurrency = many)]
async fn greet_again(event: UserCreated) {}

fn main() {}

mod more {
    use super::UserCreated;

    #[nexus::handler(max_attempts = "five")]
    async fn greet2(event: UserCreated) {}

    #[nexus::handler(max_attempts = 1.5)]
    async fn greet3(event: UserCreated) {}
}
