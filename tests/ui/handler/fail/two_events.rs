#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct OrderPaid;

#[handler]
async fn greet(user: UserCreated, order: OrderPaid) {}

fn main() {}
