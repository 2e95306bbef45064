use std::{
    fmt,
    panic::Location,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use serde_json::{Value, json};
use sqlx::{PgPool, postgres::PgPoolOptions};

use super::{
    KIT,
    server::{self, TestServer},
    settled::PATIENCE,
};
use crate::{
    client::{Bell, Client, Database, Limits},
    runtime::{Leases, Node, Points},
};

/// A migrated database of the test's own, dropped some time after the test.
///
/// A clone is the same database; it is dropped after the last one.
///
/// # Examples
///
/// ```
/// use nexus::testing::TestDatabase;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> nexus::Result {
/// let database = TestDatabase::new().await;
/// let events: i64 = sqlx::query_scalar("select count(*) from core.event_log")
///     .fetch_one(&database.pool().await)
///     .await?;
/// assert_eq!(events, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TestDatabase {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    url: String,
    /// Made from the template, which has the schema of this build and the kit's functions.
    is_migrated: bool,
    pool: OnceLock<PgPool>,
    members: Mutex<Vec<Member>>,
}

/// A node that the kit has started on the database.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) node_id: String,
    pub(super) node: Weak<Node>,
    pub(super) points: Arc<Points>,
    pub(super) leases: Leases,
}

impl Member {
    /// Whether nothing is left of it, however it ended.
    pub(super) fn is_gone(&self) -> bool {
        self.points.has_crashed() || self.node.strong_count() == 0
    }

    /// Whether it does nothing any more, or never did.
    fn is_dead(&self) -> bool {
        self.is_gone() || !self.points.has_loops()
    }
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
        Self::create(
            server,
            &format!("template {template} strategy file_copy"),
            true,
        )
        .await
    }

    /// Makes an empty database, without schema `core` and without pgmq.
    ///
    /// # Panics
    ///
    /// If there is no server, with the reason and what to do.
    pub async fn empty() -> Self {
        Self::create(TestServer::get().await, "", false).await
    }

    async fn create(server: &TestServer, how: &str, is_migrated: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{number}", server::own_prefix());
        server
            .execute(&format!("create database {name} {how}"))
            .await;
        let url = server.url(&name);
        Self {
            inner: Arc::new(Inner {
                name,
                url,
                is_migrated,
                pool: OnceLock::new(),
                members: Mutex::default(),
            }),
        }
    }

    pub(super) fn is_migrated(&self) -> bool {
        self.inner.is_migrated
    }

    /// The URL to connect to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// A small pool, for the test's own statements; a new one each time.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached.
    pub async fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(5)
            .acquire_timeout(PATIENCE)
            .connect(self.url())
            .await
            .expect("the test's database can be reached")
    }

    /// The pool that the kit uses itself; it connects when it is used.
    pub(super) fn shared_pool(&self) -> &PgPool {
        self.inner.pool.get_or_init(|| {
            PgPoolOptions::new()
                .max_connections(5)
                .acquire_timeout(PATIENCE)
                .connect_lazy(self.url())
                .expect("the kit makes URLs that can be read")
        })
    }

    /// A client for what the kit looks at.
    pub(super) fn client(&self, namespace: &str) -> Client {
        let database = Database::from_url(self.url(), "the test kit")
            .expect("the kit makes URLs that can be read");
        let bell = Bell::start(&database, namespace);
        let pool = self.shared_pool().clone();
        let limits = Limits::default();
        Client::new(&database, pool, namespace, "test-kit", limits, bell)
    }

    /// The time by the clock of the database.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    #[track_caller]
    pub fn now(&self) -> impl Future<Output = Timestamp> {
        self.tell(
            Location::caller(),
            "select (extract(epoch from core.now()) * 1000000)::bigint",
            0,
        )
    }

    /// Moves the clock of the database forward, which everything in nexus goes by: retries, schedules,
    /// partitions, idempotency keys. Leases and heartbeats that are held move along. Returns the new
    /// time.
    ///
    /// It is one leap, however long. What came due on the way is due now; of ticks that were missed by
    /// more than their grace, what the task's misfire policy says (the newest one, by default).
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    #[track_caller]
    pub fn advance(&self, by: Duration) -> impl Future<Output = Timestamp> {
        let by =
            i64::try_from(by.as_micros()).expect("a test's clock moves by less than 292,000 years");
        self.leap(
            Location::caller(),
            "select (extract(epoch from core.test_advance($1 * interval '1 microsecond', $2, $3, $4, $5)) * 1000000)::bigint",
            by,
        )
    }

    /// Moves the clock of the database to a time, which may be before now, in one leap like
    /// [`advance`](Self::advance).
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    #[track_caller]
    pub fn travel_to(&self, at: Timestamp) -> impl Future<Output = Timestamp> {
        self.leap(
            Location::caller(),
            "select (extract(epoch from core.test_advance(
                 timestamptz 'epoch' + $1 * interval '1 microsecond' - core.now(), $2, $3, $4, $5)) * 1000000)::bigint",
            at.as_microsecond(),
        )
    }

    /// Stops the clock of the database, so that it moves only when it is told to, and returns the time.
    ///
    /// What waits for a later time, were it for a millisecond, then waits until the clock is moved.
    /// Leases do not end in a database whose clock stands.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    #[track_caller]
    pub fn freeze(&self) -> impl Future<Output = Timestamp> {
        self.freeze_or_not(Location::caller(), true)
    }

    /// Lets a [stopped](Self::freeze) clock go on from where it stands, and returns the time.
    ///
    /// # Panics
    ///
    /// If the database cannot be reached, or is [empty](Self::empty).
    #[track_caller]
    pub fn unfreeze(&self) -> impl Future<Output = Timestamp> {
        self.freeze_or_not(Location::caller(), false)
    }

    async fn freeze_or_not(&self, at: &'static Location<'static>, is_frozen: bool) -> Timestamp {
        let sql = "select (extract(epoch from core.test_freeze($1 <> 0)) * 1000000)::bigint";
        self.tell(at, sql, i64::from(is_frozen)).await
    }

    async fn leap(
        &self,
        at: &'static Location<'static>,
        sql: &'static str,
        micros: i64,
    ) -> Timestamp {
        let now: i64 = sqlx::query_scalar(sql)
            .bind(micros)
            .bind(self.has_caretaker())
            .bind(self.dead_nodes())
            .bind(self.live_nodes())
            .bind(self.held_by_the_dead())
            .fetch_one(self.shared_pool())
            .await
            .unwrap_or_else(|error| panic!("{at}: the clock cannot be moved: {error}"));
        self.alarm();
        timestamp(now)
    }

    async fn tell(
        &self,
        at: &'static Location<'static>,
        sql: &'static str,
        argument: i64,
    ) -> Timestamp {
        let mut query = sqlx::query_scalar(sql);
        if sql.contains("$1") {
            query = query.bind(argument);
        }
        let now: i64 = query
            .fetch_one(self.shared_pool())
            .await
            .unwrap_or_else(|error| panic!("{at}: the clock cannot be read: {error}"));
        timestamp(now)
    }

    /// Brings the kit's functions into a database that was not made from the template.
    pub(super) async fn install(&self, at: &'static Location<'static>) {
        let installed = async {
            let is_there: bool =
                sqlx::query_scalar("select to_regproc('core.test_is_open') is not null")
                    .fetch_one(self.shared_pool())
                    .await?;
            if !is_there {
                sqlx::raw_sql(KIT).execute(self.shared_pool()).await?;
            }
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = installed.await {
            panic!("{at}: the database has no schema `core`, start an app in it first: {error}");
        }
    }

    pub(super) fn join(&self, member: Member) {
        self.inner
            .members
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(member);
    }

    pub(super) fn members(&self) -> Vec<Member> {
        self.inner
            .members
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes every loop of the nodes here look again: by their own clocks there is no reason to.
    pub(super) fn alarm(&self) {
        for member in self.members() {
            member.points.alarm();
            if let Some(node) = member.node.upgrade() {
                node.client.bell().ring_all_here();
            }
        }
    }

    /// Whether a node is at work here that would have made partitions meanwhile.
    fn has_caretaker(&self) -> bool {
        let members = self.members();
        members.iter().any(|member| !member.is_dead())
    }

    /// The nodes that are registered and will do nothing.
    pub(super) fn dead_nodes(&self) -> Vec<String> {
        self.members()
            .into_iter()
            .filter(Member::is_dead)
            .map(|member| member.node_id)
            .collect()
    }

    /// The nodes of this test that work.
    pub(super) fn live_nodes(&self) -> Vec<String> {
        self.members()
            .into_iter()
            .filter(|member| !member.is_dead())
            .map(|member| member.node_id)
            .collect()
    }

    /// What nodes held when they crashed, or were dropped: `[{"queue", "msg_id", "read_ct"}]`.
    fn held_by_the_dead(&self) -> Value {
        self.members()
            .iter()
            .flat_map(|member| member.points.left_behind())
            .map(|(queue, msg_id, read_ct)| json!({ "queue": queue, "msg_id": msg_id, "read_ct": read_ct }))
            .collect()
    }
}

fn timestamp(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).expect("the database counts in the same years")
}

impl fmt::Debug for TestDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TestDatabase")
            .field(&self.inner.name)
            .finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        server::drop_later(std::mem::take(&mut self.name));
    }
}
