#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "user.created")]
struct UserSignedUp;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

mod later {
    use nexus::prelude::*;

    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "user.created", version = 2)]
    struct UserCreated;
}

fn main() {}
