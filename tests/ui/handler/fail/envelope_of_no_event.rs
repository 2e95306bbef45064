#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

struct Db;

#[handler]
async fn greet(db: Envelope<Db>) {}

fn main() {}
