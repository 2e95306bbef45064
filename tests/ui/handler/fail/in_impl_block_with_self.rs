#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

impl UserCreated {
    #[handler]
    async fn greet(event: Self) {}

    #[handler]
    async fn greet_many(events: Batch<Self>) -> nexus::Result {
        Ok(())
    }
}

fn main() {}
