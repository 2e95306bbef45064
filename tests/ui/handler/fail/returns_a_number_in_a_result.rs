#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(event: UserCreated) -> nexus::Result<u32> {
    Ok(1)
}

fn main() {}
