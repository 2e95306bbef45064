//! The test kit (feature `testing`): a database per test, in milliseconds, and a clock that moves.
//!
//! Tests use a real Postgres: the server of `CORE_DATABASE_URL` or `DATABASE_URL` if one is set,
//! whose role must be allowed to create databases, else an embedded one that all tests of the
//! machine share and that stops by itself. Nothing is touched but databases named `nexus_t_…`.
//!
//! # Examples
//!
//! ```no_run
//! use nexus::{prelude::*, testing::TestDatabase};
//!
//! # async fn example() -> nexus::Result {
//! let database = TestDatabase::new().await;
//! let app = nexus::start(App::discover().database_url(database.url())).await?;
//! // … emit with app.client() …
//! app.idle().await?;
//! database.advance(std::time::Duration::from_secs(3600)).await;
//! app.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod checks;
mod server;

pub use checks::{assert_catalogue, assert_valid};

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, SqlSafeStr, postgres::PgPoolOptions};

use server::TestServer;

/// A migrated database of the test's own, dropped some time after the test.
#[derive(Debug)]
pub struct TestDatabase {
    name: String,
    url: String,
}

impl TestDatabase {
    /// Makes a database from a template that is migrated once per machine and schema.
    ///
    /// # Panics
    ///
    /// If there is no server, with the reason and what to do.
    pub async fn new() -> Self {
        let server = TestServer::get().await;
        let template = server.template().await;
        Self::create(server, &format!("template {template} strategy file_copy")).await
    }

    /// Makes an empty database, without schema `core` and without pgmq.
    ///
    /// # Panics
    ///
    /// If there is no server, with the reason and what to do.
    pub async fn empty() -> Self {
        Self::create(TestServer::get().await, "").await
    }

    async fn create(server: &TestServer, how: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{number}", server::own_prefix());
        server
            .execute(&format!("create database {name} {how}"))
            .await;
        let url = server.url(&name);
        Self { name, url }
    }

    /// The URL to connect to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A small pool, for the test's own statements.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached.
    pub async fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(5)
            .connect(&self.url)
            .await
            .expect("the test's database can be reached")
    }

    /// Moves the clock of the database, which everything in nexus goes by: retries, schedules,
    /// partitions, idempotency keys. Leases and heartbeats that are held move along.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    pub async fn advance(&self, by: Duration) {
        let mut connection = PgConnection::connect(&self.url)
            .await
            .expect("the test's database can be reached");
        sqlx::query("select core.test_advance($1 * interval '1 microsecond')")
            .bind(
                i64::try_from(by.as_micros())
                    .expect("a test's clock moves by less than 292,000 years"),
            )
            .execute(&mut connection)
            .await
            .expect("the template installs the clock");
        connection
            .close()
            .await
            .expect("the test's database can be reached");
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        server::drop_later(std::mem::take(&mut self.name));
    }
}

/// Runs one statement on a connection of its own.
async fn execute(url: &str, statement: &str) -> sqlx::Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()).into_sql_str())
        .execute(&mut connection)
        .await?;
    connection.close().await
}
