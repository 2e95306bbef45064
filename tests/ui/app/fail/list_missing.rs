#![allow(unused)]

use nexus::prelude::*;

fn main() {
    let app = nexus::app! { handlers };
    let app = nexus::app! { crons: };
    let app = nexus::app! { events: UserCreated };
    let app = nexus::app! { handlers: (greet) };
}
