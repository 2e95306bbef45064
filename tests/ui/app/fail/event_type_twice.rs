#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(register = false)]
struct UserCreated;

mod billing {
    use nexus::prelude::*;

    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    pub struct UserCreated;
}

#[handler]
async fn greet(event: UserCreated) {}

fn main() {
    let app = nexus::app! {
        handlers: [greet],
        events: [billing::UserCreated],
    };
}
