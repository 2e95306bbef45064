#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct Page<T> {
    items: Vec<T>,
}

fn main() {}

/// What uses it does not fail as well.
#[handler]
async fn show(page: Page<u8>) -> Option<Emit<Page<u8>>> {
    Some(Emit(page))
}
