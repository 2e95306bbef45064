//! Connections that are lent to one piece of work, and what a pool does with those that went bad.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{
    Connection, PgConnection, PgPool, Postgres, SqlSafeStr,
    pool::{PoolConnection, PoolConnectionMetadata},
    postgres::PgTransactionManager,
};
use sqlx_core::transaction::TransactionManager;

use crate::{config::Pooler, store};

/// How long the database may take to answer one request of a client.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);

/// How many lost connections are thrown away before that is an error.
const MOST_BROKEN: u32 = 5;

/// How long a connection may take to show that it is alive. Only one whose line is silent takes so long.
const PING: Duration = Duration::from_secs(2);

/// The same behind a pooler in transaction mode, where it may have to wait for a session that is free.
const POOLED_PING: Duration = Duration::from_secs(10);

/// A connection that was used so lately is not asked whether it is alive: that costs as much as half a
/// small statement. Who gets one that was lost since is as those whose statement was under way.
const TRUSTED_FOR: Duration = Duration::from_millis(100);

/// Connections that were made before a moment are not trusted any more.
///
/// A pool hands out what it has. When one of its connections has fallen silent, or leads to a server
/// that takes no writes since a failover, the others that are as old most likely do so, too.
#[derive(Debug, Clone, Default)]
pub(crate) struct Doubt {
    since: Arc<Mutex<Option<Instant>>>,
}

impl Doubt {
    /// Makes the pools close every connection that is there now before they hand it out again.
    pub(crate) fn raise(&self) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Raises it if `error` says that a server takes no writes.
    pub(crate) fn look_at(&self, error: &sqlx::Error) {
        if store::is_read_only(error) {
            self.raise();
        }
    }

    /// Whether a connection can be handed out.
    pub(crate) async fn trusts(
        &self,
        connection: &mut PgConnection,
        meta: PoolConnectionMetadata,
        pooler: Pooler,
    ) -> bool {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_some_and(|since| meta.age >= since.elapsed()) {
            return false;
        }
        // Behind a pooler a ping takes a session like any transaction, and one begins at once.
        if pooler == Pooler::Transaction || meta.idle_for < TRUSTED_FOR {
            return true;
        }
        match tokio::time::timeout(PING, connection.ping()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(%error, "a connection of the pool was lost");
                false
            }
            Err(_) => {
                tracing::debug!("a connection of the pool gives no answer");
                self.raise();
                false
            }
        }
    }
}

/// A connection of a pool. It is closed unless it is [given back](Self::give_back): whoever stops
/// waiting for an answer must not leave it to the next one.
///
/// Behind a pooler in transaction mode all that is done with it is one transaction, which giving it back
/// commits.
pub(crate) struct Lent {
    connection: Option<PoolConnection<Postgres>>,
    pooler: Pooler,
}

impl Lent {
    pub(crate) async fn of(pool: &PgPool, pooler: Pooler) -> sqlx::Result<Self> {
        let mut broken = 0;
        loop {
            // On the heap: connecting is a large future, and this one is part of many.
            let connection = Box::pin(pool.acquire()).await?;
            let mut lent = Self {
                connection: Some(connection),
                pooler,
            };
            match begin_if_pooled(&mut lent, pooler, "").await {
                Ok(()) => return Ok(lent),
                // It was lost while nobody used it, and nothing was asked on it yet.
                Err(error) if store::is_away(&error) && broken < MOST_BROKEN => broken += 1,
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) async fn give_back(mut self) -> sqlx::Result<()> {
        let pooler = self.pooler;
        commit_if_pooled(&mut self, pooler).await?;
        put_back(self.connection.take(), pooler);
        Ok(())
    }

    /// Stores what was done so far, and goes on with another piece of work.
    pub(crate) async fn commit(&mut self) -> sqlx::Result<()> {
        let pooler = self.pooler;
        commit_if_pooled(self, pooler).await?;
        begin_if_pooled(self, pooler, "").await
    }

    /// Undoes what was done since the last commit, after an error, and begins it anew.
    pub(crate) async fn restart(&mut self) -> sqlx::Result<()> {
        let pooler = self.pooler;
        roll_back_if_pooled(self, pooler).await?;
        begin_if_pooled(self, pooler, "").await
    }

    /// Gives it back after work that failed in a way that leaves the connection as good as it was.
    pub(crate) async fn give_up(mut self) {
        let pooler = self.pooler;
        if roll_back_if_pooled(&mut self, pooler).await.is_ok() {
            put_back(self.connection.take(), pooler);
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
    }
}

impl Deref for Lent {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection
            .as_ref()
            .expect("the connection is there until it is given back")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection
            .as_mut()
            .expect("the connection is there until it is given back")
    }
}

/// Returns a connection to its pool, which looks first whether it is alive. sqlx waits for that answer
/// for ever when a connection is dropped, and a silent one would take a place of the pool for good.
pub(crate) fn put_back(connection: Option<PoolConnection<Postgres>>, pooler: Pooler) {
    let Some(mut connection) = connection else {
        return;
    };
    let patience = match pooler {
        Pooler::Session => PING,
        Pooler::Transaction => POOLED_PING,
    };
    let returned = connection.return_to_pool();
    tokio::spawn(async move {
        let _ = tokio::time::timeout(patience, returned).await;
    });
}

/// Begins what is to be one transaction behind a pooler in transaction mode; `settings` are statements that
/// hold for it. Does nothing without such a pooler.
pub(crate) async fn begin_if_pooled(
    connection: &mut PgConnection,
    pooler: Pooler,
    settings: &'static str,
) -> sqlx::Result<()> {
    if pooler == Pooler::Session {
        return Ok(());
    }
    let begin = sqlx::AssertSqlSafe(format!("begin; {settings}")).into_sql_str();
    PgTransactionManager::begin(connection, Some(begin)).await
}

/// Ends what [`begin_if_pooled`] began.
pub(crate) async fn commit_if_pooled(
    connection: &mut PgConnection,
    pooler: Pooler,
) -> sqlx::Result<()> {
    if pooler == Pooler::Session {
        return Ok(());
    }
    clear(connection).await?;
    PgTransactionManager::commit(connection).await
}

/// Undoes what was done since [`begin_if_pooled`], after an error.
pub(crate) async fn roll_back_if_pooled(
    connection: &mut PgConnection,
    pooler: Pooler,
) -> sqlx::Result<()> {
    if pooler == Pooler::Session {
        return Ok(());
    }
    clear(connection).await?;
    PgTransactionManager::rollback(connection).await
}

/// Closes the prepared statements of a connection, at the end of a transaction: behind a pooler the next one
/// may have another session, which does not know them, and others get this session, whose own statements
/// have the same names.
pub(crate) async fn clear(connection: &mut PgConnection) -> sqlx::Result<()> {
    connection.clear_cached_statements().await
}

/// The error of a server that takes no writes, before it has been asked for one.
pub(crate) fn takes_no_writes() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(
        std::io::ErrorKind::ReadOnlyFilesystem,
        "the server takes no writes: it is a standby, or `default_transaction_read_only` is on",
    ))
}
