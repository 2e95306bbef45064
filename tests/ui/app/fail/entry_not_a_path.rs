#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

#[handler]
async fn greet(event: UserCreated) {}

fn main() {
    let app = nexus::app! { handlers: ["greet", greet(), greet::<u8>, &greet] };
    let app = nexus::app! { crons: [5, self], events: ["user.created"] };
}
