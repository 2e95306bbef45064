#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

#[handler]
async fn greet(event: UserCreated) {}

fn main() {
    let app = nexus::app! { handler: [greet] };
    let app = nexus::app! { schedules: [], groups: ["billing"] };
    let app = nexus::app! { handlers = [greet] };
}
