#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, Event)]
struct UserCreated {
    user_id: u64,
}

fn main() {}
