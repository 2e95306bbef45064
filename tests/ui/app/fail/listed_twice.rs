#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

#[handler]
async fn greet(event: UserCreated) {}

#[cron("@daily")]
async fn cleanup() {}

fn main() {
    let app = nexus::app! {
        handlers: [greet, crate::greet],
        crons: [cleanup, cleanup],
        events: [UserCreated, UserCreated],
    };
}
