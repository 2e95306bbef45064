#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(version = 3_000_000_000)]
struct UserCreated;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(version = 1.5)]
struct UserDeleted;

fn main() {}
