#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet<T: Send>(event: UserCreated, extra: State<T>) {}

fn main() {}
