#![allow(unused)]

use nexus::prelude::*;

struct UserCreated;

fn main() {
    let app = nexus::app! { events: [UserCreated] };
}
