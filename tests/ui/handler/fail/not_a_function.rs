#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler]
struct Greeter;

#[handler]
pub(crate) mod greeters {}

#[handler]
const GREETING: &str = "hello";

fn main() {}
