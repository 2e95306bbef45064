#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "a.very.long.event.type.that.goes.on.and.on.until.it.has.more.bytes.than.a.name.of.a.queue.can.ever.have")]
struct UserCreated;

fn main() {}
