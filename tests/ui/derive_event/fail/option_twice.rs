#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(version = 1)]
#[event(version = 2)]
struct UserCreated;

fn main() {}
