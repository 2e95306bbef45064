//! Looking for what is wrong with a database, or will be.
//!
//! - `server`: settings, connections, clocks, whoever keeps it from cleaning up, slow statements.
//! - `schema`: the objects of schema `core`, and the partitions of the log.
//! - `namespace`: queues, rights, handlers, nodes, dead letters, scheduled tasks.
//!
//! Each check is a transaction of its own that cannot write, on one connection. One that fails is a finding, and the
//! others go on.

mod namespace;
mod schema;
mod server;
#[cfg(all(test, feature = "testing"))]
mod tests;

use std::{fmt, time::Duration};

use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};

use super::{
    connect::{ConnectError, Database},
    lent,
};
use crate::{
    config::Pooler,
    store::{self, diagnosis},
};

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// Worth to be known; nothing is wrong.
    Note,
    /// It will go wrong, or somebody has to decide.
    Warning,
    /// It is wrong now: events are not emitted or handled, or may be lost.
    Error,
}

/// `error`, `warning` or `note`.
impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// Something that [`Database::diagnose`] has found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What kind of finding it is, such as `partition-missing`; it stays the same in later releases. `docs/cli.md` of
    /// the repository has all of them.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: a group, handler, node, table, setting or the like; `None` if it is the only one of its kind.
    pub subject: Option<String>,
    /// What was found, for people; one line, without a secret.
    pub what: String,
    /// What helps: a command, or SQL.
    pub help: String,
}

impl Finding {
    fn new(
        severity: Severity,
        id: &'static str,
        what: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self {
            id,
            severity,
            subject: None,
            what: what.into(),
            help: help.into(),
        }
    }

    fn error(id: &'static str, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::new(Severity::Error, id, what, help)
    }

    fn warning(id: &'static str, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::new(Severity::Warning, id, what, help)
    }

    fn note(id: &'static str, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::new(Severity::Note, id, what, help)
    }

    fn about(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }
}

/// From when on something is worth a finding. Tests provoke some by smaller ones.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// A snapshot that was held for so long, or over so many transactions, keeps queues from being cleaned up.
    held_for: Duration,
    held_transactions: i64,
    /// Dead row versions of a queue, if there are also more of them than live ones.
    dead_rows: i64,
    /// Sessions, of a hundred that there can be.
    sessions_percent: i64,
    /// Between the clocks of this machine and of the server.
    skew: Duration,
    /// The mean of a statement.
    slow: Duration,
}

const BOUNDS: Bounds = Bounds {
    held_for: Duration::from_secs(30),
    held_transactions: 1_000_000,
    dead_rows: 50_000,
    sessions_percent: 80,
    skew: Duration::from_secs(5),
    slow: Duration::from_secs(1),
};

/// How long it may take to connect.
const CONNECTS_FOR: Duration = Duration::from_secs(10);

impl Database {
    /// Looks for what is wrong with the database, its server and a namespace, or will be: the worst first, nothing if
    /// all is well. Changes nothing, waits for no lock, counts no large table, and takes seconds at most however much
    /// there is.
    ///
    /// Works without a schema, with one of another version, and as a role with few rights: what cannot be looked at is
    /// a finding `not-checked`. Does not wait for a database that is coming up.
    ///
    /// # Errors
    ///
    /// There is no connection, or it was lost.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(database: &nexus::Database) -> nexus::Result {
    /// use nexus::client::Severity;
    ///
    /// for finding in database.diagnose("shop").await? {
    ///     if finding.severity > Severity::Note {
    ///         println!("{}: {} ({})", finding.id, finding.what, finding.help);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn diagnose(&self, namespace: &str) -> Result<Vec<Finding>, ConnectError> {
        self.diagnose_by(BOUNDS, namespace).await
    }

    async fn diagnose_by(
        &self,
        bounds: Bounds,
        namespace: &str,
    ) -> Result<Vec<Finding>, ConnectError> {
        let mut look = Look {
            connection: connect(self.options())
                .await
                .map_err(|cause| self.unusable(cause))?,
            findings: Vec::new(),
        };
        let looked = async {
            let pooler = look.pooler(self).await;
            let has_schema = look.version(pooler, namespace).await?;
            look.server(bounds, has_schema).await?;
            if has_schema {
                look.schema().await?;
                look.namespace(bounds, namespace).await?;
            }
            Ok(())
        };
        looked.await.map_err(|cause| self.unusable(cause))?;
        let _ = look.connection.close().await;
        // What was found first stays first among its equals.
        look.findings
            .sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Ok(look.findings)
    }
}

async fn connect(options: &PgConnectOptions) -> sqlx::Result<PgConnection> {
    // On the heap: connecting is a large future.
    let connecting = Box::pin(PgConnection::connect_with(options));
    store::answered_within(CONNECTS_FOR, connecting).await
}

/// A look at a database that is under way.
struct Look {
    connection: PgConnection,
    findings: Vec<Finding>,
}

impl Look {
    /// Runs a check in a transaction of its own. An error if the connection was lost.
    async fn check(
        &mut self,
        what: &'static str,
        check: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<Vec<Finding>>,
    ) -> sqlx::Result<()> {
        let checked = async {
            let mut tx = diagnosis::begin(&mut self.connection).await?;
            let found = check(&mut tx).await;
            if let Err(error) = &found
                && store::is_unanswered(error)
            {
                return Ok(found);
            }
            // A pooler may give the next transaction another session.
            lent::clear(&mut tx).await?;
            tx.rollback().await?;
            Ok(found)
        };
        match store::answered_within(lent::ANSWER, checked).await? {
            Ok(found) => self.findings.extend(found),
            Err(error) if store::is_unanswered(&error) => return Err(error),
            Err(error) => self.findings.push(not_checked(what, &error)),
        }
        Ok(())
    }

    /// Compares two connections, as a node does when it starts, and returns what to expect of this one.
    async fn pooler(&mut self, database: &Database) -> Pooler {
        let finding = match database.refuse_hidden_pooler().await {
            Ok(()) => return database.mode(),
            Err(ConnectError::Unusable { cause, .. }) => not_checked("the pooler", &cause),
            Err(_) => Finding::error(
                "pooler-transaction",
                "a pooler in transaction mode stands before the server, and nexus was not told: apps do not start",
                "set CORE_POOLER=transaction, or connect to the server directly",
            ),
        };
        self.findings.push(finding);
        // Whose sessions others use as well, or may.
        Pooler::Transaction
    }

    /// Whether the schema has the version that this build works with.
    async fn version(&mut self, pooler: Pooler, namespace: &str) -> sqlx::Result<bool> {
        let verified = async {
            // Not in a transaction if that can be: it is asked more after an error.
            if pooler == Pooler::Session {
                let limit = sqlx::raw_sql("set lock_timeout = '1s'; set statement_timeout = '5s'");
                limit.execute(&mut self.connection).await?;
            }
            let limit = "set local lock_timeout = '1s'; set local statement_timeout = '5s'";
            lent::begin_if_pooled(&mut self.connection, pooler, limit).await?;
            let verified = nexus_migrations::verify(&mut self.connection).await;
            lent::roll_back_if_pooled(&mut self.connection, pooler).await?;
            Ok(verified)
        };
        match store::answered_within(lent::ANSWER, verified).await? {
            Ok(()) => Ok(true),
            Err(error) => {
                self.findings.push(schema::of_version(error, namespace)?);
                Ok(false)
            }
        }
    }

    async fn server(&mut self, bounds: Bounds, has_schema: bool) -> sqlx::Result<()> {
        self.check("settings of the server", async |c| {
            server::settings(c, bounds).await
        })
        .await?;
        self.check("who keeps the server from cleaning up", async |c| {
            server::horizon(c, bounds).await
        })
        .await?;
        // Asked for before: the clock of the server stands still in a transaction.
        let before = jiff::Timestamp::now();
        self.check("clocks", async |c| {
            server::clocks(c, bounds, before, has_schema).await
        })
        .await?;
        self.check("slow statements", async |c| {
            server::slow_statements(c, bounds).await
        })
        .await
    }

    async fn schema(&mut self) -> sqlx::Result<()> {
        self.check("objects of the schema", schema::objects).await?;
        self.check("partitions of the log", schema::partitions)
            .await
    }

    async fn namespace(&mut self, bounds: Bounds, name: &str) -> sqlx::Result<()> {
        let mut is_known = false;
        let found = &mut is_known;
        self.check("the namespace", async |c| {
            namespace::known(c, name, found).await
        })
        .await?;
        if !is_known {
            return Ok(());
        }
        self.check("rights of the role", async |c| {
            namespace::rights(c, name).await
        })
        .await?;
        self.check("queues", async |c| namespace::queues(c, bounds, name).await)
            .await?;
        self.check("groups", async |c| namespace::groups(c, name).await)
            .await?;
        self.check("nodes", async |c| namespace::nodes(c, name).await)
            .await?;
        self.check("handlers", async |c| namespace::handlers(c, name).await)
            .await?;
        self.check("events that nobody handles", async |c| {
            namespace::unhandled(c, name).await
        })
        .await?;
        self.check("scheduled tasks", async |c| {
            namespace::schedules(c, name).await
        })
        .await
    }
}

/// A check that failed, which is worse than a role that may not look.
fn not_checked(what: &str, error: &sqlx::Error) -> Finding {
    let severity = if store::is_denied(error) {
        Severity::Note
    } else {
        Severity::Warning
    };
    let help = if store::is_denied(error) {
        "run it as the role that owns schema `core`, or as a member of pg_monitor"
    } else {
        "run it again; if it stays, the reason is to be mended first"
    };
    let what_failed = format!("could not look at {what}: {error}");
    Finding::new(severity, "not-checked", what_failed, help).about(what)
}
