#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[cron("@daily")]
async fn cleanup(event: UserCreated) {}

fn main() {}
