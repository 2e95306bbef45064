#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

use std::rc::Rc;

async fn tick() {}

#[handler]
async fn greet(event: UserCreated) {
    let name = Rc::new(event.user_id);
    tick().await;
    println!("{name}");
}

fn main() {}
