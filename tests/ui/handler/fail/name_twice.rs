#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

mod mail {
    #[nexus::handler(group = "billing", name = "invoice")]
    async fn send(event: super::UserCreated) {}

    #[nexus::handler]
    async fn welcome(event: super::UserCreated) {}
}

#[handler(group = "billing")]
async fn invoice(event: UserCreated) {}

#[handler]
async fn welcome(event: UserCreated) {}

fn main() {}
