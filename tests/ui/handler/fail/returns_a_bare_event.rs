#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn copy(event: UserCreated) -> nexus::Result<UserCreated> {
    Ok(event)
}

fn main() {}
