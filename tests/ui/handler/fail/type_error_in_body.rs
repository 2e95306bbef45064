#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(event: UserCreated) -> nexus::Result {
    let name: String = event.user_id;
    Ok(())
}

fn main() {}
