#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(from = "begining")]
async fn misspelt(event: UserCreated) {}

#[handler(from = "yesterday")]
async fn unknown(event: UserCreated) {}

#[handler(from = "2026-01-31")]
async fn without_time_of_day(event: UserCreated) {}

#[handler(from = "2026-01-31T10:00:00")]
async fn without_zone(event: UserCreated) {}

#[handler(from = "2026-02-30T00:00:00Z")]
async fn no_such_day(event: UserCreated) {}

#[handler(from = beginning)]
async fn without_quotes(event: UserCreated) {}

fn main() {}
