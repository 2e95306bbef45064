use nexus::prelude::*;

/// An order was placed.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "elsewhere.order_placed")]
#[cron("@daily", name = "sample_order")]
pub struct OrderPlaced {
    /// Which.
    pub order_id: u64,
}

/// Packs it.
#[handler(group = "elsewhere")]
pub async fn pack(order: OrderPlaced) {
    println!("packing {}", order.order_id);
}

/// Sweeps the floor.
#[cron("@weekly")]
pub async fn sweep_elsewhere() {}

/// An order to test the shop with.
#[cron("@monthly")]
pub const TEST_ORDER: OrderPlaced = OrderPlaced { order_id: 0 };
