//! What Prometheus is told: a few orders are paid for, one of them in vain, and the text of the node is printed.
//!
//! ```sh
//! cargo run --example metrics
//! ```

use std::time::Duration;

use nexus::prelude::*;

/// An order to be paid for.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed", key = order)]
struct OrderPlaced {
    order: u32,
}

/// Order 13 cannot be paid for.
#[handler(group = "payments", max_attempts = 2, backoff = "fixed(10ms)")]
async fn pay(placed: OrderPlaced) -> nexus::Result {
    match placed.order {
        13 => Err("the card is blocked".into()),
        _ => Ok(()),
    }
}

/// Is told of below as well.
#[cron("* * * * * *")]
async fn count_orders() {}

#[tokio::main]
async fn main() -> nexus::Result {
    let node = nexus::start(App::discover().namespace("metrics")).await?;
    let orders: Vec<OrderPlaced> = (10..20).map(|order| OrderPlaced { order }).collect();
    node.client().emit_all(&orders).await?;
    // This node collects the figures of the namespace if it is the first of it: with the next look in five seconds
    // otherwise.
    let told = async {
        loop {
            let text = node.metrics();
            let has_ticked =
                !text.contains("nexus_tick_lateness_seconds_count{namespace=\"metrics\"} 0");
            if has_ticked && text.contains("nexus_group_depth{") {
                break text;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let text = tokio::time::timeout(Duration::from_mins(1), told).await?;
    print!("{text}");
    node.shutdown().await;
    Ok(())
}
