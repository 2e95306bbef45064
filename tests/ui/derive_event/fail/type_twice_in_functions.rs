#![allow(unused)]

use nexus::prelude::*;

fn one() {
    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "user.created")]
    struct UserCreated;
}

fn two() {
    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "user.created")]
    struct UserCreated;
}

fn main() {}
