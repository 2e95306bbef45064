//! What has to be done from time to time, by whichever node gets to it.

use std::{sync::Arc, time::Duration};

use super::Node;
use crate::store::maintenance;

/// New subscriptions are settled, and partitions and expired rows looked after, this often.
const EVERY: Duration = Duration::from_secs(2);
const MAINTAIN_EVERY: u32 = 30;

pub(crate) async fn run(node: Arc<Node>) {
    let mut round = 0_u32;
    while !node.stop.is_cancelled() {
        if let Err(error) = care(&node, round.is_multiple_of(MAINTAIN_EVERY)).await {
            tracing::warn!(%error, "maintenance failed, trying again");
        }
        round = round.wrapping_add(1);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = node.stop.cancelled() => {}
        }
    }
}

async fn care(node: &Node, everything: bool) -> sqlx::Result<()> {
    let namespace = &node.row.namespace;
    let mut connection = node.connection().await?;
    if everything {
        maintenance::maintain(&mut connection, namespace).await?;
        for name in
            maintenance::drop_expired_partitions(&mut connection, node.settings.retention).await?
        {
            tracing::info!(
                partition = name,
                "dropped a partition of the event log, its retention has passed"
            );
        }
    }
    if maintenance::settle_subscriptions(&mut connection, namespace).await? > 0 {
        node.client.bell().ring_all_here();
    }
    connection.give_back();
    Ok(())
}
