#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(tpye = "user.created")]
struct UserCreated;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(name = "user.deleted")]
struct UserDeleted;

fn main() {}
