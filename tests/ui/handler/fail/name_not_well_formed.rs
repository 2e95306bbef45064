#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated {
    user_id: u64,
}

#[handler(group = "billing__eu", name = "send mail")]
async fn greet(event: UserCreated) {}

#[handler(name = "")]
async fn greet_again(event: UserCreated) {}

#[handler]
async fn _greet(event: UserCreated) {}

fn main() {}

mod more {
    use super::UserCreated;

    #[nexus::handler(name = "1st")]
    async fn greet2(event: UserCreated) {}
}
