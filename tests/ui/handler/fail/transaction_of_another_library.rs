#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

mod sqlx {
    pub struct Tx;
}

#[handler]
async fn greet(event: UserCreated, tx: &mut sqlx::Tx) {}

fn main() {}
