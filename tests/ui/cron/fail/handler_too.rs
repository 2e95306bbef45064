#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[cron("@daily")]
#[handler]
async fn greet(event: UserCreated) {}

#[handler]
#[cron("@daily")]
async fn greet_again(event: UserCreated) {}

fn main() {}
