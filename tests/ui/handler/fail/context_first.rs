#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
async fn greet(ctx: Ctx, event: UserCreated) {}

#[handler]
async fn greet_again(client: Client, event: UserCreated) {}

fn main() {}
