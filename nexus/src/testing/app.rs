use std::{
    fmt,
    ops::Deref,
    panic::Location,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use sqlx::PgPool;

use super::{
    TestDatabase,
    database::Member,
    settled::{self, MOST_PATIENCE, NotSettled, PATIENCE},
};
use crate::{
    app::{App, Handle, HandlerStats},
    client::DeadLetter,
    registry::LINK_ITS_CRATE,
    runtime::points::Attempt,
};

/// A running app on a database of its own.
///
/// It derefs to [`Handle`], which has the [client](Handle::client). When it is dropped it stops without
/// waiting for what runs; [`shutdown`](Self::shutdown) stops it gently.
///
/// Methods that find something else than they should panic with a text that begins with the file and
/// line of their caller.
///
/// # Examples
///
/// ```standalone_crate
/// use nexus::{prelude::*, testing::TestApp};
///
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "user.created")]
/// struct UserCreated { email: String }
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "mail.sent")]
/// struct MailSent { to: String }
///
/// #[handler]
/// async fn send_welcome(user: UserCreated) -> Emit<MailSent> {
///     Emit(MailSent { to: user.email })
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> nexus::Result {
/// let app = TestApp::start(App::discover()).await;
/// app.client().emit(&UserCreated { email: "ada@example.org".into() }).await?;
/// app.settled().await;
/// let mail = app.only_emitted::<MailSent>().await;
/// assert_eq!(mail.to, "ada@example.org");
/// # Ok(())
/// # }
/// ```
pub struct TestApp {
    /// Taken by [`shutdown`](Self::shutdown).
    handle: Option<Handle>,
    pub(super) database: TestDatabase,
    pub(super) member: Member,
}

/// A tick of a scheduled task that was fired.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FiredTick {
    /// The moment for which it was fired.
    pub due_at: Timestamp,
    /// When that was, by the clock of the database.
    pub fired_at: Timestamp,
    /// The event that it emitted.
    pub event_id: i64,
}

impl TestApp {
    /// Starts an app on a new [`TestDatabase`]. Environment variables of nexus hold as ever, but for
    /// those of the database and of the node's id.
    ///
    /// What the builder does not say is set so that a test is quick, forgets nothing, and has many beside
    /// it: an idle poll of 25 ms, a log that is kept for a hundred years, a pool of 10 connections.
    ///
    /// # Panics
    ///
    /// If the app does not start, with the reason. To test that it does not, give
    /// [`nexus::start`](crate::start) the URL of a [`TestDatabase`].
    #[track_caller]
    pub fn start(app: App) -> impl Future<Output = Self> {
        let at = Location::caller();
        // Boxed, like all that holds a whole start: it would make a large future of every test's.
        Box::pin(async move { Self::start_at(at, &TestDatabase::new().await, app).await })
    }

    /// Starts an app on a database that is there: another node of the same app, another app, or the
    /// same one again after a crash.
    ///
    /// # Panics
    ///
    /// If the app does not start, with the reason.
    #[track_caller]
    pub fn start_on(database: &TestDatabase, app: App) -> impl Future<Output = Self> {
        Box::pin(Self::start_at(Location::caller(), database, app))
    }

    /// Starts an app that registers and can emit, and does nothing by itself: no handler is called but
    /// by [`run_handler`](Self::run_handler), no tick fired. What is emitted stays in the queues.
    ///
    /// # Panics
    ///
    /// If the app does not start, with the reason.
    #[track_caller]
    pub fn without_workers(app: App) -> impl Future<Output = Self> {
        let at = Location::caller();
        Box::pin(async move {
            app.points().without_loops();
            Self::start_at(at, &TestDatabase::new().await, app).await
        })
    }

    async fn start_at(at: &'static Location<'static>, database: &TestDatabase, app: App) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let node_id = format!("test-{}-{number}", std::process::id());
        app.points().watch();
        if database.is_migrated() {
            app.points().set_migrated();
        }
        let handle = match crate::start(app.for_test(database.url(), node_id)).await {
            Ok(handle) => handle,
            Err(error) => panic!("{at}: the app did not start: {}", crate::Error::from(error)),
        };
        if !database.is_migrated() {
            database.install(at).await;
        }
        let node = &handle.running().node;
        node.points.of_node(node.leases.clone());
        let member = Member {
            node_id: node.row.id.clone(),
            node: Arc::downgrade(node),
            points: Arc::clone(&node.points),
            leases: node.leases.clone(),
        };
        database.join(member.clone());
        let app = Self {
            handle: Some(handle),
            database: database.clone(),
            member,
        };
        // The clean cut of the new subscriptions is made now: a transaction that the test begins and
        // leaves open has nothing to do with it then.
        let settled: sqlx::Result<i32> = sqlx::query_scalar("select core.settle_subscriptions($1)")
            .bind(app.client().namespace())
            .fetch_one(app.pool())
            .await;
        if let Err(error) = settled {
            panic!("{at}: {error}");
        }
        app
    }

    /// The database, to start another node on it or to look into it.
    #[must_use]
    pub fn database(&self) -> &TestDatabase {
        &self.database
    }

    /// A pool for the test's own statements. It is not the app's: it works after a crash, and takes no
    /// connection from handlers.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        self.database.shared_pool()
    }

    /// The time by the clock of the database: see [`TestDatabase::now`].
    #[track_caller]
    pub fn now(&self) -> impl Future<Output = Timestamp> {
        self.database.now()
    }

    /// Moves the clock forward: see [`TestDatabase::advance`]. Follow it by
    /// [`settled`](Self::settled).
    #[track_caller]
    pub fn advance(&self, by: Duration) -> impl Future<Output = Timestamp> {
        self.database.advance(by)
    }

    /// Moves the clock to a time: see [`TestDatabase::travel_to`].
    #[track_caller]
    pub fn travel_to(&self, at: Timestamp) -> impl Future<Output = Timestamp> {
        self.database.travel_to(at)
    }

    /// Stops the clock: see [`TestDatabase::freeze`].
    #[track_caller]
    pub fn freeze(&self) -> impl Future<Output = Timestamp> {
        self.database.freeze()
    }

    /// Lets the clock go on: see [`TestDatabase::unfreeze`].
    #[track_caller]
    pub fn unfreeze(&self) -> impl Future<Output = Timestamp> {
        self.database.unfreeze()
    }

    /// Moves the clock forward and stops at every moment at which something is due (a tick, a retry, a
    /// delayed emit), until all that follows from it has settled: as if the app had run all the time.
    ///
    /// A daily task takes 365 stops a year, a few seconds. Where an hourly one would take too long, move
    /// in one leap with [`advance`](Self::advance).
    ///
    /// # Panics
    ///
    /// If something does not settle: see [`settled`](Self::settled).
    #[track_caller]
    pub fn live_through(&self, by: Duration) -> impl Future<Output = ()> {
        let at = Location::caller();
        async move {
            let by = jiff::SignedDuration::try_from(by).expect("a test lives for a few years");
            let end = self.database.now().await + by;
            loop {
                self.settle_or_panic(at).await;
                let left = end.duration_since(self.database.now().await);
                let Ok(left) = Duration::try_from(left) else {
                    break;
                };
                let next = settled::left(&self.database, at).await.next;
                self.database
                    .advance(next.map_or(left, |next| next.min(left)))
                    .await;
            }
        }
    }

    /// Waits until everything that cascaded has settled: no message is due, claimed, or to be adopted, no
    /// tick or delayed emit is due, and no new subscription is owed an event, in the whole database.
    ///
    /// What waits for a later time (a retry, a snooze, a delayed emit) is not waited for: move the clock,
    /// or see [`drained`](Self::drained).
    ///
    /// # Panics
    ///
    /// If that takes longer than two minutes (five, while attempts go on), with what is still open and why: see
    /// [`settled_within`](Self::settled_within).
    #[track_caller]
    pub fn settled(&self) -> impl Future<Output = ()> {
        self.settle_or_panic(Location::caller())
    }

    async fn settle_or_panic(&self, at: &'static Location<'static>) {
        if let Err(open) = settled::settled(&self.database, PATIENCE, MOST_PATIENCE, at).await {
            panic!("{at}: {open}");
        }
    }

    /// As [`settled`](Self::settled), with a limit of your own.
    ///
    /// It is given up sooner, after five seconds, when all that is open waits for a node that is not
    /// there.
    ///
    /// # Errors
    ///
    /// What is still open, and why.
    ///
    /// # Panics
    ///
    /// If the database cannot be asked.
    #[track_caller]
    pub fn settled_within(&self, limit: Duration) -> impl Future<Output = Result<(), NotSettled>> {
        settled::settled(&self.database, limit, limit, Location::caller())
    }

    /// Waits until no message and no delayed emit is left at all, moving the clock to the time for which
    /// the next one waits, again and again: what fails fails as often as it may.
    ///
    /// # Panics
    ///
    /// If something does not settle (see [`settled`](Self::settled)), or goes on for five minutes.
    #[track_caller]
    pub fn drained(&self) -> impl Future<Output = ()> {
        let at = Location::caller();
        async move {
            let began = Instant::now();
            loop {
                self.settle_or_panic(at).await;
                let left = settled::left(&self.database, at).await;
                if left.is_drained {
                    break;
                }
                if began.elapsed() > MOST_PATIENCE {
                    let report = settled::report(&self.database, MOST_PATIENCE, at).await;
                    panic!("{at}: there is always something left to wait for\n{report}");
                }
                // Ticks come at their time meanwhile.
                if let Some(next) = left.next {
                    self.database.advance(next).await;
                }
            }
        }
    }

    /// The calls that this node has made of a handler, in the order in which they began.
    ///
    /// # Panics
    ///
    /// If the app has no such handler; the text names those it has.
    #[must_use]
    #[track_caller]
    pub fn attempts(&self, handler: &str) -> Vec<Attempt> {
        self.check_handler(Location::caller(), handler);
        let mut attempts = self.member.points.attempts();
        attempts.retain(|attempt| attempt.handler == handler);
        attempts
    }

    pub(super) fn check_handler(&self, at: &Location<'_>, handler: &str) {
        let known: Vec<&str> = self
            .running_routes()
            .iter()
            .map(|route| route.name())
            .collect();
        assert!(
            known.contains(&handler),
            "{at}: the app has no handler `{handler}`; it has {} ({LINK_ITS_CRATE})",
            settled::list(&known)
        );
    }

    pub(super) fn running_routes(&self) -> &[Arc<crate::runtime::Route>] {
        &self.running().routes
    }

    /// The dead letters of the app's groups and of the namespace's main queue, oldest first.
    ///
    /// # Panics
    ///
    /// If the database cannot be asked.
    #[track_caller]
    pub fn dead_letters(&self) -> impl Future<Output = Vec<DeadLetter>> {
        let at = Location::caller();
        settled::dead_letters(&self.database, self.client().namespace(), at)
    }

    /// The one dead letter there is.
    ///
    /// # Panics
    ///
    /// If there is none, or there are more; the text lists them, or what may still become one.
    #[track_caller]
    pub fn only_dead_letter(&self) -> impl Future<Output = DeadLetter> {
        let at = Location::caller();
        async move {
            let mut letters =
                settled::dead_letters(&self.database, self.client().namespace(), at).await;
            match letters.len() {
                1 => letters.remove(0),
                0 => panic!(
                    "{at}: expected one dead letter, found none{}",
                    settled::report(&self.database, Duration::ZERO, at)
                        .await
                        .outlook()
                ),
                count => panic!(
                    "{at}: expected one dead letter, found {count}{}",
                    settled::lines(&letters.iter().map(settled::letter).collect::<Vec<_>>())
                ),
            }
        }
    }

    /// The ticks of a scheduled task (a `#[cron]` item, or one made at run time) that were fired, in the
    /// order of their due times.
    ///
    /// # Panics
    ///
    /// If the namespace has no such task; the text names those it has.
    #[track_caller]
    pub fn ticks(&self, task: &str) -> impl Future<Output = Vec<FiredTick>> {
        let at = Location::caller();
        async move {
            let rows: sqlx::Result<Vec<(i64, i64, i64)>> = sqlx::query_as(
                "select (extract(epoch from k.due_at) * 1000000)::bigint,
                        (extract(epoch from k.fired_at) * 1000000)::bigint, k.event_id
                 from core.ticks k
                 join core.scheduled_tasks t using (task_id)
                 where t.namespace = $1 and t.name = $2 and k.event_id is not null
                 order by k.due_at, k.event_id",
            )
            .bind(self.client().namespace())
            .bind(task)
            .fetch_all(self.pool())
            .await;
            let rows = rows.unwrap_or_else(|error| panic!("{at}: ticks cannot be read: {error}"));
            if rows.is_empty() {
                self.check_task(at, task).await;
            }
            let time = |micros| {
                Timestamp::from_microsecond(micros).expect("the database counts in the same years")
            };
            rows.into_iter()
                .map(|(due_at, fired_at, event_id)| FiredTick {
                    due_at: time(due_at),
                    fired_at: time(fired_at),
                    event_id,
                })
                .collect()
        }
    }

    async fn check_task(&self, at: &Location<'_>, task: &str) {
        let known: sqlx::Result<Vec<String>> = sqlx::query_scalar(
            "select name from core.scheduled_tasks where namespace = $1 order by name",
        )
        .bind(self.client().namespace())
        .fetch_all(self.pool())
        .await;
        let known = known.unwrap_or_else(|error| panic!("{at}: tasks cannot be read: {error}"));
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        assert!(
            known.contains(&task),
            "{at}: there is no scheduled task `{task}`, but {}",
            settled::list(&known)
        );
    }

    /// Stops gently, as [`Handle::shutdown`] does, and returns the final statistics. After a crash there
    /// is nothing left to stop.
    ///
    /// # Panics
    ///
    /// Never; the handle is there until here.
    pub async fn shutdown(mut self) -> Vec<HandlerStats> {
        let handle = self.handle.take().expect("it is taken only here");
        if self.member.points.has_crashed() {
            return handle.stats();
        }
        handle.shutdown().await
    }
}

impl Deref for TestApp {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        self.handle
            .as_ref()
            .expect("it is taken only by `shutdown`, which consumes the app")
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        if let Some(handle) = &self.handle {
            self.member.points.note_left_behind();
            handle.running().abandon();
        }
    }
}

impl fmt::Debug for TestApp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestApp")
            .field("node", &self.member.node_id)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}
