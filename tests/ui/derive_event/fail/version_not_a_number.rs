#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(version = "2")]
struct UserCreated;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(version = two)]
struct UserDeleted;

fn main() {}
