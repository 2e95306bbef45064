//! Connections that are lent to one piece of work, and what a pool does with those that went bad.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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

/// The same for the loops of a node, which look for work a few times a second and try again when a connection
/// turns out to be lost.
const TRUSTED_BY_LOOPS_FOR: Duration = Duration::from_secs(5);

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

    /// When it was raised last.
    fn since(&self) -> Option<Instant> {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a connection can be handed out.
    pub(crate) async fn trusts(
        &self,
        connection: &mut PgConnection,
        meta: PoolConnectionMetadata,
        pooler: Pooler,
    ) -> bool {
        let since = self.since();
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

/// A pool and, of its connections, those that were in use a moment ago: they go from one piece of work to the next as
/// they are. The pool asks a connection before it hands it out and again when it comes back, which costs as much as
/// a small transaction.
#[derive(Clone)]
pub(crate) struct Lender {
    pool: PgPool,
    pooler: Pooler,
    doubt: Doubt,
    trusted_for: Duration,
    warm: Arc<Mutex<Warm>>,
}

#[derive(Default)]
struct Warm {
    /// The one that was used last is at the end.
    connections: Vec<(Instant, PoolConnection<Postgres>)>,
    /// Somebody gives back to the pool what is not used again.
    is_watched: bool,
}

impl Lender {
    pub(crate) fn new(pool: PgPool, pooler: Pooler, doubt: Doubt) -> Self {
        let warm = Arc::default();
        Self {
            pool,
            pooler,
            doubt,
            trusted_for: TRUSTED_FOR,
            warm,
        }
    }

    pub(crate) fn for_loops(mut self) -> Self {
        self.trusted_for = TRUSTED_BY_LOOPS_FOR;
        self
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) fn pooler(&self) -> Pooler {
        self.pooler
    }

    pub(crate) fn doubt(&self) -> &Doubt {
        &self.doubt
    }

    /// A connection for a piece of work.
    pub(crate) async fn lend(&self) -> sqlx::Result<Lent> {
        let mut broken = 0;
        loop {
            let mut lent = Lent {
                connection: Some(self.acquire().await?),
                lender: self.clone(),
            };
            match begin_if_pooled(&mut lent, self.pooler, "").await {
                Ok(()) => return Ok(lent),
                // It was lost while nobody used it, and nothing was asked on it yet.
                Err(error) if store::is_away(&error) && broken < MOST_BROKEN => broken += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// A connection, which is to be [put back](Self::put_back).
    pub(crate) async fn acquire(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        let warm = self.lock().connections.pop();
        if let Some((since, connection)) = warm {
            if since.elapsed() < self.trusted_for && self.doubt.since().is_none_or(|at| at < since)
            {
                return Ok(connection);
            }
            put_back(connection, self.pooler);
        }
        // On the heap: connecting is a large future, and this one is part of many.
        Box::pin(self.pool.acquire()).await
    }

    /// Takes back a connection in which nothing is under way.
    pub(crate) fn put_back(&self, connection: PoolConnection<Postgres>) {
        // Half of them at most: whoever uses the pool itself does not get them.
        let most = self.pool.options().get_max_connections() as usize / 2;
        let mut warm = self.lock();
        if self.pooler == Pooler::Transaction
            || warm.connections.len() >= most
            || self.pool.is_closed()
        {
            drop(warm);
            put_back(connection, self.pooler);
            return;
        }
        warm.connections.push((Instant::now(), connection));
        if !std::mem::replace(&mut warm.is_watched, true) {
            drop(warm);
            let watch = Watch {
                warm: Arc::clone(&self.warm),
                trusted_for: self.trusted_for,
                is_done: false,
            };
            tokio::spawn(watch.run());
        }
    }

    /// Closes all connections, and waits for those that are in use.
    pub(crate) async fn close(&self) {
        let closing = self.pool.close();
        for (_, connection) in std::mem::take(&mut self.lock().connections) {
            drop(connection.detach());
        }
        closing.await;
    }

    fn lock(&self) -> MutexGuard<'_, Warm> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives warm connections back to the pool when they were not used for a while, until there are none.
struct Watch {
    warm: Arc<Mutex<Warm>>,
    trusted_for: Duration,
    is_done: bool,
}

impl Watch {
    async fn run(mut self) {
        loop {
            tokio::time::sleep(self.trusted_for / 2).await;
            let mut warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner);
            let cold = warm
                .connections
                .iter()
                .take_while(|(since, _)| since.elapsed() >= self.trusted_for)
                .count();
            for (_, connection) in warm.connections.drain(..cold) {
                put_back(connection, Pooler::Session);
            }
            if warm.connections.is_empty() {
                warm.is_watched = false;
                self.is_done = true;
                return;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        // The async runtime ends.
        let mut warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner);
        warm.is_watched = false;
        for (_, connection) in warm.connections.drain(..) {
            drop(connection.detach());
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
    lender: Lender,
}

impl Lent {
    pub(crate) async fn give_back(mut self) -> sqlx::Result<()> {
        let pooler = self.lender.pooler;
        commit_if_pooled(&mut self, pooler).await?;
        if let Some(connection) = self.connection.take() {
            self.lender.put_back(connection);
        }
        Ok(())
    }

    /// Stores what was done so far, and goes on with another piece of work.
    pub(crate) async fn commit(&mut self) -> sqlx::Result<()> {
        let pooler = self.lender.pooler;
        commit_if_pooled(self, pooler).await?;
        begin_if_pooled(self, pooler, "").await
    }

    /// Undoes what was done since the last commit, after an error, and begins it anew.
    pub(crate) async fn restart(&mut self) -> sqlx::Result<()> {
        let pooler = self.lender.pooler;
        roll_back_if_pooled(self, pooler).await?;
        begin_if_pooled(self, pooler, "").await
    }

    /// Gives it back after work that failed in a way that leaves the connection as good as it was.
    pub(crate) async fn give_up(mut self) {
        let pooler = self.lender.pooler;
        if roll_back_if_pooled(&mut self, pooler).await.is_ok()
            && let Some(connection) = self.connection.take()
        {
            put_back(connection, pooler);
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
fn put_back(mut connection: PoolConnection<Postgres>, pooler: Pooler) {
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
