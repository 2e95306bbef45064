//! Moves what still carries a former name of this node's handlers.
//!
//! The subscription was renamed when the build registered. Messages follow here, in batches that
//! lock little, for as long as the name stands in the database: transactions that began before the
//! rename write more of them when they commit, a redriven letter or a restored backup at any time.

use std::{sync::Arc, time::Duration};

use sqlx::Connection;

use super::{Node, points::Sleeper};
use crate::store::{
    self, queue,
    renames::{self, FormerName, Place},
};

/// How often to look for more.
const EVERY: Duration = Duration::from_secs(2);

/// Messages moved, or dead letters looked at, in one transaction.
const MOST: i64 = 2_000;

/// How long a transaction may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn run(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        if let Err(error) = move_all(&node).await
            && !node.mend(&error).await
        {
            node.trouble.met("move messages of a former name", &error);
        }
        tokio::select! {
            () = node.points.sleep(Sleeper::Renamer, EVERY) => {}
            () = node.stop.cancelled() => {}
        }
    }
}

async fn move_all(node: &Node) -> sqlx::Result<()> {
    for mut name in store::answered_within(PATIENCE, former_names(node)).await? {
        let (mut moved, mut left_out) = (0, 0);
        let mut place = Some(Place::first());
        while let Some(from) = place.take_if(|_| !node.stop.is_cancelled()) {
            let batch = store::answered_within(
                PATIENCE,
                store::despite_conflicts(|| move_messages(node, &name, &from)),
            )
            .await?;
            if batch.messages > 0 {
                node.client.bell().of(&name.queue).notify_one();
            }
            moved += batch.messages;
            left_out += batch.left_out;
            place = batch.next;
        }
        let mut letters = 0;
        let mut has_more = true;
        while has_more && !node.stop.is_cancelled() {
            let found;
            (found, has_more) =
                store::answered_within(PATIENCE, move_letters(node, &mut name)).await?;
            letters += found;
        }
        if moved + left_out + letters > 0 {
            tracing::info!(
                group = name.group,
                former = name.former,
                handler = name.handler,
                messages = moved,
                dead_letters = letters,
                left_out,
                "moved what carried a former name; events that had been sent to both names were left out"
            );
        }
    }
    Ok(())
}

async fn former_names(node: &Node) -> sqlx::Result<Vec<FormerName>> {
    let mut connection = node.connection().await?;
    let row = &node.row;
    let names = renames::of_handlers(&mut connection, &row.namespace, &row.handlers).await?;
    connection.give_back().await?;
    Ok(names)
}

async fn move_messages(
    node: &Node,
    name: &FormerName,
    from: &Place,
) -> sqlx::Result<renames::Moved> {
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    queue::walk_the_index(&mut tx).await?;
    let namespace = &node.row.namespace;
    let moved = renames::move_messages(&mut tx, namespace, name, from, MOST).await?;
    tx.commit().await?;
    connection.give_back().await?;
    Ok(moved)
}

async fn move_letters(node: &Node, name: &mut FormerName) -> sqlx::Result<(i64, bool)> {
    let mut connection = node.connection().await?;
    let namespace = &node.row.namespace;
    let moved = renames::move_dead_letters(&mut connection, namespace, name, MOST).await?;
    connection.give_back().await?;
    Ok(moved)
}
