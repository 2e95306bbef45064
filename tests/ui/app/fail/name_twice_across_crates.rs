#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "elsewhere.order_placed")]
struct OrderPlaced;

#[handler(group = "elsewhere")]
async fn pack(order: OrderPlaced) {}

#[cron("@hourly")]
async fn sample_order() {}

fn main() {
    let app = nexus::app! {
        handlers: [pack, nexus_test_elsewhere::pack],
        crons: [sample_order, nexus_test_elsewhere::OrderPlaced],
    };
}
