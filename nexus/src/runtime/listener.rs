//! Hears the doorbell of other processes.

use std::{sync::Arc, time::Duration};

use sqlx::{
    Executor,
    postgres::{PgListener, PgPoolOptions},
};

use super::Node;
use crate::store::{self, notify};

/// How long to wait before connecting again. Polling covers the gap.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// How long connecting, and any answer, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// After so long without a ring the connection is looked at.
const LOOK_AFTER: Duration = Duration::from_secs(30);

pub(crate) async fn run(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        tokio::select! {
            heard = listen(&node) => {
                if let Err(error) = heard {
                    tracing::debug!(%error, "lost the doorbell, workers poll meanwhile");
                }
                tokio::select! {
                    () = tokio::time::sleep(RECONNECT_AFTER) => {}
                    () = node.stop.cancelled() => {}
                }
            }
            () = node.stop.cancelled() => {}
        }
    }
}

async fn listen(node: &Node) -> sqlx::Result<()> {
    // A connection of its own: it waits forever, which no connection of the handlers' pool should.
    let connected = async {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .connect_with(node.options.clone())
            .await?;
        let mut listener = PgListener::connect_with(&pool).await?;
        listener
            .listen(&notify::channel(&node.row.namespace))
            .await?;
        Ok(listener)
    };
    let mut listener = store::answered_within(PATIENCE, connected).await?;
    loop {
        // A line that has fallen silent looks like one on which nobody rings.
        let Ok(heard) = tokio::time::timeout(LOOK_AFTER, listener.try_recv()).await else {
            store::answered_within(PATIENCE, listener.execute("select 1")).await?;
            continue;
        };
        match heard? {
            Some(ring) => node.client.bell().ring_here(ring.payload()),
            // It has connected again, and may have missed something.
            None => node.client.bell().ring_all_here(),
        }
    }
}
