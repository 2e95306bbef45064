#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

struct MyError;

#[handler]
async fn greet(event: UserCreated) -> Result<(), MyError> {
    Ok(())
}

fn main() {}
