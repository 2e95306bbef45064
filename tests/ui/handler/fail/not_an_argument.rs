#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

struct Db;

#[handler]
async fn greet(event: UserCreated, db: Db) {}

fn main() {}
