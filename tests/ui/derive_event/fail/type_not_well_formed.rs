#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "User-Created")]
struct UserCreated;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "user..deleted")]
struct UserDeleted;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "1st")]
struct First;

fn main() {}
