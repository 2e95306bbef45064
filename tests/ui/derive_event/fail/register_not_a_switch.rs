#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(register = "no")]
struct UserCreated;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(register)]
struct UserDeleted;

fn main() {}
