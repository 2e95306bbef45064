#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

#[handler]
async fn greet(event: UserCreated) {}

fn main() {
    let app = nexus::app!(greet);
    let app = nexus::app!([greet]);
    let app = nexus::app!("billing");
}
