//! Looking after events that are not due yet.

use jiff::Timestamp;
use sqlx::PgConnection;

use super::{Client, OperateError, operate::failed};
use crate::store::delayed_emits;

/// An event that waits to be emitted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DelayedEvent {
    /// The id that the event will have; what [`Client::cancel`] takes.
    pub event_id: i64,
    /// The stored name of its type.
    pub event_type: String,
    /// The version of its schema.
    pub event_version: u32,
    /// The entity that it is about, if its type names one.
    pub key: Option<String>,
    /// The idempotency key that it was emitted with.
    pub idempotency_key: Option<String>,
    /// The correlation id that it will have.
    pub correlation_id: String,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When it is due.
    pub due_at: Timestamp,
    /// It is due, and this is why it could not be emitted. It is tried again, at first after a
    /// minute, then ever more seldom, down to once an hour.
    pub error: Option<String>,
}

impl Client {
    /// Cancels a delayed event of the namespace.
    ///
    /// True: it was still waiting, and will never be. False: it has been emitted, was cancelled
    /// before, or there never was such an event. An event that is due can be cancelled until a node has
    /// emitted it, which of the two happens is decided by the database. The idempotency key of the
    /// event is released, so that it can be emitted anew.
    ///
    /// # Errors
    ///
    /// The database could not be asked. After a lost connection the event may have been cancelled.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example(client: &Client, reminder: i64) -> nexus::Result {
    /// if !client.cancel(reminder).await? {
    ///     println!("too late, the reminder is on its way");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn cancel(&self, event_id: i64) -> Result<bool, OperateError> {
        let doing = "cancel a delayed event";
        let cancelled = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let is_cancelled = self.cancel_in(&mut connection, event_id).await?;
            connection.give_back().await.map_err(failed(doing))?;
            Ok(is_cancelled)
        };
        self.answered(failed(doing), cancelled).await
    }

    /// Cancels a delayed event of the namespace with a transaction of yours.
    ///
    /// From then on no node emits it; once you have rolled back, it is emitted after all. The result is
    /// that of [`cancel`](Self::cancel).
    ///
    /// # Errors
    ///
    /// The database could not be asked; your transaction is aborted.
    ///
    /// # Examples
    ///
    /// ```
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct OrderPaid { order: i64, reminder: i64 }
    /// #[handler]
    /// async fn settle(paid: OrderPaid, tx: &mut Tx, ctx: Ctx) -> nexus::Result {
    ///     ctx.client().cancel_in(tx, paid.reminder).await?;
    ///     Ok(())
    /// }
    /// ```
    pub async fn cancel_in(
        &self,
        connection: &mut PgConnection,
        event_id: i64,
    ) -> Result<bool, OperateError> {
        delayed_emits::cancel(connection, self.namespace(), event_id)
            .await
            .map_err(failed("cancel a delayed event"))
    }

    /// The delayed events of the namespace, at most `limit`, those that are due first.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn delayed(&self, limit: u32) -> Result<Vec<DelayedEvent>, OperateError> {
        let doing = "list delayed events";
        let listed = async {
            let mut connection = self.lend().await?;
            let rows = delayed_emits::list(&mut connection, self.namespace(), limit.into()).await?;
            connection.give_back().await?;
            Ok(rows)
        };
        let rows = self.asked(doing, listed).await?;
        Ok(rows
            .into_iter()
            .map(|row| DelayedEvent {
                event_id: row.event_id,
                event_type: row.event_type,
                event_version: row.event_version.unsigned_abs(),
                key: row.key,
                idempotency_key: row.idempotency_key,
                correlation_id: row.correlation_id,
                requested_at: row.requested_at,
                due_at: row.due_at,
                error: row.error,
            })
            .collect())
    }
}
