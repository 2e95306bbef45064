#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

use std::sync::Mutex;

static COUNT: Mutex<u32> = Mutex::new(0);

async fn tick() {}

#[handler]
async fn greet(event: UserCreated) {
    let mut count = COUNT.lock().unwrap();
    tick().await;
    *count += 1;
}

fn main() {}
