#![allow(unused)]

use nexus::prelude::*;

#[derive(Event, JsonSchema)]
struct UserCreated;

#[derive(Event, Serialize, Deserialize)]
struct UserDeleted;

#[handler]
async fn greet(event: UserCreated) -> Emit<UserDeleted> {
    Emit(UserDeleted)
}

#[handler]
async fn greet_all(event: Batch<UserCreated>, tx: &mut Tx) -> nexus::Result {
    tx.emit(&UserDeleted)?;
    Ok(())
}

#[cron("@daily")]
const DAILY: UserCreated = UserCreated;

fn list() {
    let app = nexus::app! { handlers: [greet], events: [UserDeleted] };
}

fn main() {}
