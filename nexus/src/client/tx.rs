use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use sqlx::{
    AssertSqlSafe, Postgres, SqlSafeStr,
    pool::PoolConnection,
    postgres::{PgConnection, PgTransactionManager},
};
// `sqlx::Transaction` cannot give its connection up, which closing it needs, and `sqlx` does not
// export the trait that counts savepoints.
use sqlx_core::transaction::TransactionManager;

use tokio::sync::OwnedSemaphorePermit;

use super::{
    Client, EmissionInTx, EmitError,
    lent::{self, ANSWER},
};
use crate::{
    config::Pooler,
    event::{EncodeError, Event, Outgoing},
    store,
};

/// A transaction: your own statements, emits, and (in a handler) the completion of the message
/// commit together or not at all.
///
/// It derefs to [`PgConnection`], so a function of yours may take `&mut PgConnection`, and statements
/// are sent by `sqlx::query(…).execute(&mut *tx)`, in a handler too. A handler cannot
/// commit it: `Ok` commits, `Err` rolls back, and one that sends `commit` as a statement is
/// dead-lettered. Outside of handlers it comes from [`Client::begin`].
///
/// Events emitted on it are checked at once and stored by one statement just before the commit;
/// until then `core.event_log` does not show them, not even to this transaction.
///
/// Dropped without a commit (the handler timed out, its lease was lost) its connection is closed,
/// which makes the server roll back and stop a statement that still runs.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { user_id: i64 }
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct AccountOpened { user_id: i64 }
/// #[handler]
/// async fn open_account(user: UserCreated, tx: &mut Tx) -> nexus::Result {
///     sqlx::query("insert into accounts (user_id) values ($1)")
///         .bind(user.user_id)
///         .execute(&mut *tx)
///         .await?;
///     tx.emit(&AccountOpened { user_id: user.user_id })?;
///     Ok(()) // row, event and completion commit together
/// }
/// ```
pub struct Tx {
    connection: Option<PoolConnection<Postgres>>,
    client: Client,
    outgoing: Vec<Outgoing>,
    /// A handler's leave to hold a connection, for as long as it does.
    leave: Option<OwnedSemaphorePermit>,
}

/// Why a transaction that is not [whole](Tx::is_whole) is not committed.
pub(crate) const NOT_WHOLE: &str = "a savepoint was left open in the transaction, or its `begin` was cancelled, which ends the transaction";

impl Tx {
    /// Begins; `settings` are sent along with `begin` in the same round trip.
    pub(crate) async fn begin(
        client: &Client,
        connection: PoolConnection<Postgres>,
        settings: &str,
    ) -> sqlx::Result<Self> {
        let begin = AssertSqlSafe(format!("begin; {settings}")).into_sql_str();
        // From now on the connection is closed if something goes wrong.
        let mut tx = Self {
            connection: Some(connection),
            client: client.clone(),
            outgoing: Vec::new(),
            leave: None,
        };
        PgTransactionManager::begin(tx.connection(), Some(begin)).await?;
        Ok(tx)
    }

    pub(crate) fn with_leave(self, leave: OwnedSemaphorePermit) -> Self {
        let mut tx = self;
        tx.leave = Some(leave);
        tx
    }

    /// Whether the transaction is the one that was begun: no savepoint is left open in it, and it was
    /// not rolled back by a savepoint whose `begin` was cancelled.
    pub(crate) fn is_whole(&self) -> bool {
        PgTransactionManager::get_transaction_depth(self) == 1
    }

    /// Emits an event with this transaction; what it returns sets options. The event has no id before the
    /// commit; where you need it, such as to cancel a delayed event, use [`Client::emit_in`] with the transaction.
    ///
    /// # Errors
    ///
    /// The event has no form that can be stored; nothing was sent and the transaction goes on.
    ///
    /// # Examples
    ///
    /// ```
    /// # use nexus::prelude::*;
    /// # use std::time::Duration;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct OrderPlaced { order: u64 }
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct StockReserved { order: u64 }
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct ReservationExpired { order: u64 }
    /// #[handler]
    /// async fn reserve(placed: OrderPlaced, tx: &mut Tx) -> nexus::Result {
    ///     tx.emit(&StockReserved { order: placed.order })?;
    ///     tx.emit(&ReservationExpired { order: placed.order })?.after(Duration::from_mins(15));
    ///     Ok(())
    /// }
    /// ```
    pub fn emit<E: Event>(&mut self, event: &E) -> Result<EmissionInTx<'_>, EncodeError> {
        let outgoing = self.client.outgoing(event)?;
        Ok(EmissionInTx::new(self.outgoing.push_mut(outgoing)))
    }

    /// Emits several events with this transaction: all of them, or none after an error.
    ///
    /// For options emit them one by one; they are stored by one statement all the same.
    ///
    /// # Errors
    ///
    /// One of the events has no form that can be stored.
    pub fn emit_all<'a, E: Event>(
        &mut self,
        events: impl IntoIterator<Item = &'a E>,
    ) -> Result<(), EncodeError> {
        let outgoing: Result<Vec<_>, _> = events
            .into_iter()
            .map(|event| self.client.outgoing(event))
            .collect();
        self.outgoing.extend(outgoing?);
        Ok(())
    }

    /// Stores the emitted events, commits, and wakes the workers.
    ///
    /// # Errors
    ///
    /// Nothing was stored, unless it is [`EmitError::Unknown`]: then the commit got no answer within
    /// 30 s, or the connection was lost, and it may have happened.
    pub async fn commit(mut self) -> Result<(), EmitError> {
        if !self.is_whole() {
            return Err(EmitError::Commit(sqlx::Error::Protocol(
                NOT_WHOLE.to_owned(),
            )));
        }
        let outgoing = self.take_outgoing();
        let client = self.client.clone();
        // Options were set after the events were checked.
        client.check(&outgoing)?;
        let receipt = client.store_in(self.connection(), &outgoing, ANSWER);
        let receipt = receipt.await.inspect_err(|error| {
            if let EmitError::Append { source } = error {
                client.doubt().look_at(source);
            }
        })?;
        store::answered_within(ANSWER, self.commit_only())
            .await
            .map_err(super::not_committed)?;
        client.emitted().add_all(&outgoing);
        client.wake(receipt.queues);
        Ok(())
    }

    /// Gives the transaction up; dropping it does the same, but closes the connection.
    ///
    /// # Errors
    ///
    /// The connection was lost, so that the server rolls back by itself.
    pub async fn rollback(mut self) -> sqlx::Result<()> {
        self.clear().await?;
        PgTransactionManager::rollback(self.connection()).await?;
        if let Some(connection) = self.connection.take() {
            self.client.lender().put_back(connection);
        }
        Ok(())
    }

    /// Leaves no prepared statements behind in a session that others use as well.
    async fn clear(&mut self) -> sqlx::Result<()> {
        match self.client.pooler() {
            Pooler::Session => Ok(()),
            Pooler::Transaction => lent::clear(self.connection()).await,
        }
    }

    /// The events emitted so far, which leave the transaction's care.
    pub(crate) fn take_outgoing(&mut self) -> Vec<Outgoing> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        // A statement takes idempotency keys in this order. If it takes several statements, they have to
        // follow it as well, else two transactions with the same keys wait for each other.
        if super::chunks(&outgoing).len() > 1 {
            outgoing.sort_by(|one, other| one.idempotency_key.cmp(&other.idempotency_key));
        }
        outgoing
    }

    pub(crate) async fn commit_only(mut self) -> sqlx::Result<()> {
        self.clear().await?;
        PgTransactionManager::commit(self.connection()).await?;
        if let Some(connection) = self.connection.take() {
            self.client.lender().put_back(connection);
        }
        Ok(())
    }

    fn connection(&mut self) -> &mut PgConnection {
        self.connection
            .as_mut()
            .expect("the connection is taken only when the transaction ends")
    }
}

impl Deref for Tx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection
            .as_ref()
            .expect("the connection is taken only when the transaction ends")
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection()
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Closing the socket instead of queueing a rollback: the server may be in the middle
            // of a statement, which it stops once it notices (`client_connection_check_interval`).
            drop(connection.detach());
        }
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx")
            .field("outgoing", &self.outgoing.len())
            .finish_non_exhaustive()
    }
}
