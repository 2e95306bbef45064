//! Dead letters are found by cause, keep their history, and are redriven, edited and purged without losing
//! or doubling a message, whoever is killed or does the same at the same time.

use std::{
    collections::BTreeSet,
    str::FromStr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nexus::{
    client::{
        DeadLetter, DeadLetterCursor, DeadLetterFilter, EditError, LeftWhy, OperateError, Redriven,
    },
    event::EncodeError,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::{until, within};
use serde_json::{Value, json};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, SqlSafeStr, postgres::PgConnectOptions,
};

/// A fee is to be charged.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fee.due", key = user_id)]
struct FeeDue {
    user_id: i64,
    amount: u32,
    card: Option<Card>,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
struct Card {
    number: String,
}

/// Another fact.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "coupon.offered")]
struct CouponOffered {
    user_id: i64,
}

/// What a handler saw of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    event_id: i64,
    amount: u32,
    attempt: u32,
    redrives: u32,
    is_edited: bool,
    key: String,
    correlation_id: Option<String>,
    past_errors: usize,
}

#[derive(Clone, Default)]
struct Bank {
    is_open: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Bank {
    fn open(&self) {
        self.is_open.store(true, Ordering::Relaxed);
    }

    fn close(&self) {
        self.is_open.store(false, Ordering::Relaxed);
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn last(&self) -> Seen {
        self.seen().pop().expect("the handler ran")
    }
}

#[handler(group = "billing", max_attempts = 2, backoff = "fixed(1s)")]
async fn charge(fee: Envelope<FeeDue>, bank: State<Bank>) -> nexus::Result {
    bank.seen.lock().unwrap().push(Seen {
        event_id: fee.event_id(),
        amount: fee.amount,
        attempt: fee.attempt(),
        redrives: fee.meta().redrive_count(),
        is_edited: fee.meta().is_edited(),
        key: fee.delivery_key(),
        correlation_id: fee.meta().correlation_id().map(str::to_owned),
        past_errors: fee.meta().past_errors().len(),
    });
    if bank.is_open.load(Ordering::Relaxed) {
        return Ok(());
    }
    Err(format!(
        "no answer for user {} after {}ms",
        fee.user_id,
        30 + fee.user_id
    )
    .into())
}

#[handler(group = "billing", name = "remind")]
async fn remind(fee: FeeDue) -> nexus::Result {
    Err(Error::permanent(format!(
        "user {} has no address",
        fee.user_id
    )))
}

#[handler(group = "mails")]
async fn offer(coupon: CouponOffered) -> nexus::Result {
    Err(Error::permanent(format!(
        "user {} has no mailbox",
        coupon.user_id
    )))
}

fn fee(user_id: i64) -> FeeDue {
    FeeDue {
        user_id,
        amount: 10,
        card: None,
    }
}

fn app(handlers: &[&str], bank: &Bank) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .state(bank.clone())
}

const BILLING: &str = "core_events_demo__billing";

/// An app whose workers stand still, with as many dead letters of `charge`.
async fn buried(letters: i64) -> TestApp {
    let app = TestApp::without_workers(app(&["charge"], &Bank::default())).await;
    bury(&app, letters).await;
    app
}

/// Emits fees, and gives all messages up that wait for `charge`, as its worker would.
async fn bury(app: &TestApp, letters: i64) {
    let fees: Vec<FeeDue> = (1..=letters).map(fee).collect();
    app.client().emit_all(&fees).await.unwrap();
    sqlx::query(
        "select core.dead_letter($1, msg_id, read_ct, 'Attempts exhausted',
                    'no answer for user ' || msg_id, 2, '[{\"attempt\": 1, \"at\": \"2026-01-01T00:00:00Z\", \"error\": \"no answer\"}]')
         from pgmq.q_core_events_demo__billing",
    )
    .bind(BILLING)
    .execute(app.pool())
    .await
    .unwrap();
}

async fn execute(pool: &PgPool, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()).into_sql_str())
        .execute(pool)
        .await
        .unwrap_or_else(|error| panic!("{error} in {statement}"));
}

/// The ids of the events in the queue and in the dead letters of `billing`, in order.
async fn places(pool: &PgPool) -> (Vec<i64>, Vec<i64>) {
    let ids = async |table: &str| {
        let text = format!(
            "select (headers ->> 'eventId')::bigint from pgmq.q_{BILLING}{table} order by 1"
        );
        sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
            .fetch_all(pool)
            .await
            .unwrap()
    };
    (ids("").await, ids("_dlq").await)
}

async fn letters(app: &TestApp, filter: DeadLetterFilter) -> Vec<DeadLetter> {
    let letters = app.client().dead_letters("billing", 1_000).filter(filter);
    letters.await.unwrap()
}

/// All dead letters of `billing`.
fn all() -> DeadLetterFilter {
    DeadLetterFilter::new()
}

async fn fingerprint(pool: &PgPool, error: &str) -> String {
    sqlx::query_scalar("select core.error_fingerprint('Permanent error', $1)")
        .bind(error)
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn errors_that_differ_in_values_only_have_one_fingerprint() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let same = [
        [
            "timeout after 3s for user 17",
            "timeout after 250.5ms for\n  user 18",
        ],
        ["no row \"a b\" in 'x'", "no row \"c \\\" d\" in 'y z'"],
        [
            "order 0b5c1f2e-1111-4222-8333-444455556666 is gone",
            "order AB5C1F2E-0000-4222-8333-444455550000 is gone",
        ],
        [
            "block 0xFF00 of deadbeef01",
            "block 0x1 of 0123456789abcdef",
        ],
        [
            "no mailbox ada@example.com",
            "no mailbox bob.b@mail.example.org",
        ],
        [
            "10.0.0.1:5432 refused at 2026-01-02T03:04:05.678Z",
            "127.0.0.1:80 refused at 2027-11-30T13:14:15Z",
        ],
        ["unknown ids 1, 2, 3", "unknown ids 4"],
    ];
    let mut seen = BTreeSet::new();
    for [one, other] in same {
        let print = fingerprint(&pool, one).await;
        assert_eq!(print, fingerprint(&pool, other).await, "{one} / {other}");
        assert!(print.len() == 16 && seen.insert(print), "{one}");
    }
    // Words count, and so do the names in backticks of our own errors.
    let different = [
        ["no route to host", "no route to user"],
        ["can't read, won't retry", "can't write, won't retry"],
        ["at `user_id`: no number", "at `amount`: no number"],
    ];
    for [one, other] in different {
        let print = fingerprint(&pool, one).await;
        assert_ne!(print, fingerprint(&pool, other).await, "{one} / {other}");
    }
    let reasons: i64 = sqlx::query_scalar(
        "select count(distinct core.error_fingerprint(reason, 'x')) from unnest('{a, b, null}'::text[]) reason",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(reasons, 3);
}

#[tokio::test]
async fn letters_are_listed_by_handler_type_cause_and_age_page_by_page() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge", "remind", "offer"], &bank)).await;
    app.client().emit(&fee(1)).await.unwrap();
    app.client()
        .emit(&CouponOffered { user_id: 5 })
        .await
        .unwrap();
    app.drained().await;
    let later = app.advance(Duration::from_hours(5)).await;
    app.client().emit_all(&[fee(2), fee(3)]).await.unwrap();
    app.drained().await;

    let newest = letters(&app, all()).await;
    assert_eq!(newest.len(), 6);
    assert!(newest.is_sorted_by_key(|letter| std::cmp::Reverse((letter.failed_at, letter.id))));
    let charged = letters(&app, all().handler("charge")).await;
    assert_eq!(charged.len(), 3);
    let letter = &charged[0];
    assert_eq!(
        (
            letter.handler.as_deref(),
            letter.event_type.as_deref(),
            letter.attempts
        ),
        (Some("charge"), Some("fee.due"), 2)
    );
    assert!(letter.failed_at >= later);

    // One cause, whatever the user and the time.
    let print = letter.fingerprint.clone().unwrap();
    assert!(
        charged
            .iter()
            .all(|other| other.fingerprint.as_ref() == Some(&print))
    );
    assert_eq!(letters(&app, all().fingerprint(print)).await.len(), 3);
    assert_eq!(letters(&app, all().fingerprint("none")).await.len(), 0);
    assert_eq!(letters(&app, all().event_type("fee.due")).await.len(), 6);
    assert_eq!(
        letters(&app, all().event_type("coupon.offered"))
            .await
            .len(),
        0
    );
    assert_eq!(
        letters(&app, all().reason("Permanent error")).await.len(),
        3
    );
    assert_eq!(letters(&app, all().without_handler()).await.len(), 0);
    let some = [newest[0].id, newest[5].id, 999];
    assert_eq!(letters(&app, DeadLetterFilter::from(&some)).await.len(), 2);

    let hour = Duration::from_hours(1);
    assert_eq!(letters(&app, all().newer_than(hour)).await.len(), 4);
    assert_eq!(letters(&app, all().older_than(hour)).await.len(), 2);
    assert_eq!(
        letters(&app, all().older_than(hour).handler("charge"))
            .await
            .len(),
        1
    );
    assert_eq!(letters(&app, all().failed_from(later)).await.len(), 4);
    assert_eq!(letters(&app, all().failed_until(later)).await.len(), 2);

    // Page by page, with a cursor that has travelled as text.
    let mut paged: Vec<i64> = Vec::new();
    let mut after: Option<DeadLetterCursor> = None;
    loop {
        let mut page = app
            .client()
            .dead_letters("billing", 2)
            .filter(all().event_type("fee.due"));
        if let Some(cursor) = after {
            page = page.after(DeadLetterCursor::from_str(&cursor.to_string()).unwrap());
        }
        let page = page.await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor());
        paged.extend(page.iter().map(|letter| letter.id));
    }
    let ids: Vec<i64> = newest.iter().map(|letter| letter.id).collect();
    assert_eq!(paged, ids);
    let error = app.client().dead_letters("nobody", 1).await.unwrap_err();
    assert!(
        matches!(error, OperateError::UnknownGroup { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_summary_tells_what_died_of_what_in_all_groups() {
    let app = TestApp::start(app(&["charge", "remind", "offer"], &Bank::default())).await;
    app.client().emit_all(&[fee(1), fee(2)]).await.unwrap();
    app.client()
        .emit(&CouponOffered { user_id: 5 })
        .await
        .unwrap();
    app.drained().await;
    let before = app.advance(Duration::from_hours(1)).await;
    app.client().emit(&fee(3)).await.unwrap();
    app.drained().await;

    let summary = app.client().dead_letter_summary(all()).await.unwrap();
    let mut told: Vec<_> = summary
        .iter()
        .map(|cause| {
            (
                cause.group.as_str(),
                cause.handler.as_deref().unwrap(),
                cause.letters,
            )
        })
        .collect();
    assert_eq!(
        told[2],
        ("mails", "offer", 1),
        "the smallest number comes last"
    );
    told.sort_unstable();
    assert_eq!(
        told,
        [
            ("billing", "charge", 3),
            ("billing", "remind", 3),
            ("mails", "offer", 1)
        ]
    );
    let charge = summary
        .iter()
        .find(|cause| cause.handler.as_deref() == Some("charge"))
        .unwrap();
    assert_eq!(charge.event_type.as_deref(), Some("fee.due"));
    assert_eq!(charge.sample_reason.as_deref(), Some("Attempts exhausted"));
    assert_eq!(
        charge.sample_error.as_deref(),
        Some("no answer for user 3 after 33ms")
    );
    assert!(charge.first_failed_at < before && before <= charge.last_failed_at);
    let newest = letters(&app, all().fingerprint(charge.fingerprint.clone().unwrap())).await;
    assert_eq!(newest[0].id, charge.sample_id);

    let filter = all().handler("remind").newer_than(Duration::from_mins(30));
    let summary = app.client().dead_letter_summary(filter).await.unwrap();
    assert_eq!((summary.len(), summary[0].letters), (1, 1));
}

/// How many pages of tables and indexes a statement touches, that of the catalog not counted: it is in the
/// session's cache after the first time.
async fn pages(connection: &mut PgConnection, statement: &str) -> i64 {
    let text = format!("explain (analyze, buffers, format json) {statement}");
    let mut pages = 0;
    for _ in 0..2 {
        let plan: Value = sqlx::query_scalar(AssertSqlSafe(text.clone()).into_sql_str())
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        let plan = &plan[0]["Plan"];
        pages = plan["Shared Hit Blocks"].as_i64().unwrap()
            + plan["Shared Read Blocks"].as_i64().unwrap();
    }
    pages
}

#[tokio::test]
async fn looking_for_a_few_among_many_walks_an_index() {
    let app = buried(1).await;
    // 30,000 letters, of which a thousandth is of another handler, type and cause; not analyzed since.
    execute(
        app.pool(),
        "insert into pgmq.q_core_events_demo__billing_dlq (enqueued_at, vt, message, headers)
         select core.now() - n * interval '1 second', core.now(), l.message || jsonb_build_object('pad', repeat('x', 300)),
                l.headers || case when n % 1000 = 0
                    then '{\"handler\": \"rare\", \"eventType\": \"rare.type\", \"fingerprint\": \"rare\"}' else '{}'::jsonb end
         from pgmq.q_core_events_demo__billing_dlq l, generate_series(1, 30000) n",
    )
    .await;
    let table: i64 = sqlx::query_scalar(
        "select pg_relation_size('pgmq.q_core_events_demo__billing_dlq') / 8192",
    )
    .fetch_one(app.pool())
    .await
    .unwrap();
    assert!(table > 1_500, "{table} pages");
    let mut connection = app.pool().acquire().await.unwrap();
    for filter in [
        r#"{"handler": "rare"}"#,
        r#"{"eventType": "rare.type"}"#,
        r#"{"fingerprint": "rare"}"#,
        r#"{"handler": "charge"}"#,
        r#"{"olderThan": "8 hours"}"#,
        r#"{"handler": "rare", "newerThan": "1 hour"}"#,
        "{}",
    ] {
        for page in ["", ", now() - interval '8.1 hours', 5"] {
            let list =
                format!("select * from core.dead_letters('demo', 'billing', '{filter}', 20{page})");
            let pages = pages(&mut connection, &list).await;
            assert!(pages < 100, "{list}: {pages} of {table} pages");
        }
    }
    let redrive =
        "select * from core.redrive('demo', 'billing', '{\"handler\": \"charge\"}', p_limit => 20)";
    let touched = pages(&mut connection, redrive).await;
    assert!(touched < 1_000, "{touched} of {table} pages");
}

#[tokio::test]
async fn a_table_that_is_believed_to_be_empty_is_not_walked_for_each_letter() {
    let app = buried(1).await;
    // A vacuum that sees none of the letters, which are committed after it.
    let mut tx = app.pool().begin().await.unwrap();
    sqlx::query(
        "insert into pgmq.q_core_events_demo__billing_dlq (enqueued_at, vt, message, headers)
         select core.now() - n * interval '1 second', core.now(), l.message || jsonb_build_object('pad', repeat('x', 300)), l.headers
         from pgmq.q_core_events_demo__billing_dlq l, generate_series(1, 30000) n",
    )
    .execute(&mut *tx)
    .await
    .unwrap();
    execute(
        app.pool(),
        "delete from pgmq.q_core_events_demo__billing_dlq",
    )
    .await;
    execute(app.pool(), "vacuum pgmq.q_core_events_demo__billing_dlq").await;
    tx.commit().await.unwrap();

    let mut connection = app.pool().acquire().await.unwrap();
    for (call, most) in [
        (
            "core.redrive('demo', 'billing', '{}', p_limit => 20)",
            1_500,
        ),
        ("core.purge_dead_letters('demo', 'billing', '{}', 20)", 500),
    ] {
        let pages = pages(&mut connection, &format!("select * from {call}")).await;
        assert!(pages < most, "{call}: {pages} pages");
    }
}

#[tokio::test]
async fn a_redriven_message_keeps_its_identity_and_has_all_attempts_before_it() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    let event_id = app
        .client()
        .emit(&fee(1))
        .correlation_id("checkout-9")
        .await
        .unwrap();
    app.drained().await;
    let first = bank.seen();
    let redriven = app
        .client()
        .redrive("billing", all())
        .by("ada")
        .await
        .unwrap();
    assert_eq!(redriven.messages, 1);
    assert_eq!(redriven.handlers[0].handler.as_deref(), Some("charge"));
    assert_eq!(redriven.handlers[0].event_version, Some(1));
    assert!(redriven.handlers[0].is_live && redriven.waiting() == 0);
    assert!(redriven.left.is_empty());

    // It fails twice again, then the bank opens.
    app.drained().await;
    assert_eq!(app.only_dead_letter().await.attempts, 2);
    bank.open();
    app.client().redrive("billing", all()).await.unwrap();
    app.drained().await;
    let seen = bank.seen();
    let told: Vec<(u32, u32, usize)> = seen
        .iter()
        .map(|seen| (seen.attempt, seen.redrives, seen.past_errors))
        .collect();
    assert_eq!(
        told,
        [(1, 0, 0), (2, 0, 1), (1, 1, 2), (2, 1, 3), (1, 2, 4)]
    );
    for seen in &seen {
        assert_eq!(seen.event_id, event_id);
        assert_eq!(seen.key, first[0].key);
        assert_eq!(seen.correlation_id.as_deref(), Some("checkout-9"));
        assert!(!seen.is_edited);
    }
    assert_eq!(places(app.pool()).await, (vec![], vec![]));
}

#[tokio::test]
async fn the_history_tells_every_redrive_and_keeps_the_newest_ten() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    app.client().emit(&fee(1)).await.unwrap();
    app.drained().await;
    let first = app.only_dead_letter().await;
    assert_eq!((first.redrive_count, first.redrives.len()), (0, 0));
    app.client()
        .redrive("billing", all())
        .by("ada")
        .await
        .unwrap();
    app.drained().await;
    let second = app.only_dead_letter().await;
    app.client().redrive("billing", all()).await.unwrap();
    app.drained().await;
    let third = app.only_dead_letter().await;

    assert_eq!((third.redrive_count, third.is_edited), (2, false));
    let [ada, node] = &third.redrives[..] else {
        panic!("{:?}", third.redrives)
    };
    assert_eq!((ada.by.as_str(), node.by.as_str()), ("ada", app.node_id()));
    for redrive in [ada, node] {
        assert_eq!(redrive.reason, "Attempts exhausted");
        assert_eq!(redrive.error, first.error);
        assert_eq!((redrive.attempts, redrive.edited), (2, false));
    }
    let millis = |letter: &DeadLetter| letter.failed_at.as_millisecond();
    let at = |text: &str| {
        text.parse::<nexus::jiff::Timestamp>()
            .unwrap()
            .as_millisecond()
    };
    assert_eq!(at(&ada.failed_at), millis(&first));
    assert_eq!(at(&node.failed_at), millis(&second));
    assert!(at(&ada.at) >= at(&ada.failed_at) && at(&ada.at) <= at(&node.failed_at));
    // The errors of all attempts, those before the redrives included.
    let attempts: Vec<u32> = third.errors.iter().map(|error| error.attempt).collect();
    assert_eq!(attempts, [1, 2, 1, 2, 1, 2]);

    for round in 3..=12 {
        let by = format!("round {round}");
        app.client().redrive("billing", all()).by(by).await.unwrap();
        app.drained().await;
    }
    let last = app.only_dead_letter().await;
    assert_eq!(
        (last.redrive_count, last.redrives.len(), last.errors.len()),
        (12, 10, 10)
    );
    assert_eq!(
        (last.redrives[0].by.as_str(), last.redrives[9].by.as_str()),
        ("round 3", "round 12")
    );
}

#[tokio::test]
async fn redrives_at_the_same_time_move_each_letter_once() {
    let app = buried(2_000).await;
    let (_, ids) = places(app.pool()).await;
    let mut operators = tokio::task::JoinSet::new();
    for operator in 0..4 {
        let client = app.client().clone();
        operators.spawn(async move {
            let redrive = client
                .redrive("billing", all())
                .by(format!("operator {operator}"));
            redrive.await.unwrap().messages
        });
    }
    let moved = within("all are done", operators.join_all()).await;
    assert_eq!(moved.iter().sum::<u64>(), 2_000, "{moved:?}");
    assert_eq!(places(app.pool()).await, (ids, vec![]));
}

#[tokio::test]
async fn purging_and_redriving_at_the_same_time_do_one_of_both() {
    let app = buried(2_000).await;
    let (redriving, purging) = (app.client().clone(), app.client().clone());
    let redrive = tokio::spawn(async move { redriving.redrive("billing", all()).await });
    let purge = tokio::spawn(async move { purging.purge_dead_letters("billing", all()).await });
    let redriven = within("it is redriven", redrive)
        .await
        .unwrap()
        .unwrap()
        .messages;
    let purged = within("it is purged", purge)
        .await
        .unwrap()
        .unwrap()
        .letters;
    let (queue, dead) = places(app.pool()).await;
    assert_eq!(redriven + purged, 2_000);
    assert_eq!((queue.len() as u64, dead.len()), (redriven, 0));
}

/// Locks a dead letter, so that what comes to it waits; returns once somebody does, with its backend.
async fn waits_for(app: &TestApp, lock: &mut sqlx::Transaction<'_, sqlx::Postgres>) -> i32 {
    let own: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut **lock)
        .await
        .unwrap();
    until("somebody waits for the letter", || async {
        sqlx::query_scalar(
            "select pid from pg_stat_activity
             where datname = current_database() and $1 = any (pg_blocking_pids(pid))",
        )
        .bind(own)
        .fetch_optional(app.pool())
        .await
        .unwrap()
    })
    .await
}

#[tokio::test]
async fn a_redrive_that_is_cut_off_leaves_each_message_in_one_place() {
    let app = buried(1_200).await;
    let (_, ids) = places(app.pool()).await;
    // In the second batch there is one that somebody else holds: the first batch is moved, the second one
    // stops half-way.
    let mut lock = app.pool().begin().await.unwrap();
    sqlx::query("select from pgmq.q_core_events_demo__billing_dlq where msg_id = 700 for update")
        .execute(&mut *lock)
        .await
        .unwrap();
    let client = app.client().clone();
    let progress = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&progress);
    let redrive = tokio::spawn(async move {
        let redrive = client.redrive("billing", all());
        redrive
            .on_progress(move |done| told.lock().unwrap().push(done.messages))
            .await
    });
    let pid = waits_for(&app, &mut lock).await;
    sqlx::query("select pg_terminate_backend($1)")
        .bind(pid)
        .execute(app.pool())
        .await
        .unwrap();
    let error = within("it is told", redrive).await.unwrap().unwrap_err();
    assert!(
        matches!(error, OperateError::Interrupted { done: 500, .. }),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        "could not redrive dead letters after the first 500: call again for the rest"
    );
    assert_eq!(*progress.lock().unwrap(), [500]);
    lock.rollback().await.unwrap();
    let (queue, dead) = places(app.pool()).await;
    assert_eq!((queue.len(), dead.len()), (500, 700));

    // Whoever drops the future, or dies, has cut it off as well.
    let mut lock = app.pool().begin().await.unwrap();
    sqlx::query("select from pgmq.q_core_events_demo__billing_dlq where msg_id = 1200 for update")
        .execute(&mut *lock)
        .await
        .unwrap();
    let client = app.client().clone();
    let redrive = tokio::spawn(async move { client.redrive("billing", all()).await });
    waits_for(&app, &mut lock).await;
    redrive.abort();
    assert!(within("it ends", redrive).await.unwrap_err().is_cancelled());
    lock.rollback().await.unwrap();
    // The server finishes the statement, or gives it up when it notices.
    let redriven = app.client().redrive("billing", all()).await.unwrap();
    assert!(redriven.messages <= 700);
    assert_eq!(places(app.pool()).await, (ids, vec![]));
}

#[tokio::test]
async fn a_purge_that_is_cut_off_says_how_far_it_got() {
    let app = buried(700).await;
    let mut lock = app.pool().begin().await.unwrap();
    sqlx::query("select from pgmq.q_core_events_demo__billing_dlq where msg_id = 600 for update")
        .execute(&mut *lock)
        .await
        .unwrap();
    let client = app.client().clone();
    let purge = tokio::spawn(async move { client.purge_dead_letters("billing", all()).await });
    let pid = waits_for(&app, &mut lock).await;
    sqlx::query("select pg_terminate_backend($1)")
        .bind(pid)
        .execute(app.pool())
        .await
        .unwrap();
    let error = within("it is told", purge).await.unwrap().unwrap_err();
    assert!(
        matches!(error, OperateError::Interrupted { done: 500, .. }),
        "{error}"
    );
    lock.rollback().await.unwrap();
    let (queue, dead) = places(app.pool()).await;
    assert_eq!((queue.len(), dead.len()), (0, 200));
}

#[tokio::test]
async fn a_rate_spreads_what_becomes_due() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    app.client()
        .emit_all(&(1..=5).map(fee).collect::<Vec<_>>())
        .await
        .unwrap();
    app.drained().await;
    let oldest_first: Vec<i64> = letters(&app, all())
        .await
        .iter()
        .rev()
        .map(|letter| letter.event_id.unwrap())
        .collect();
    bank.open();
    let before = bank.seen().len();
    let now = app.freeze().await;
    let redrive = || {
        app.client()
            .redrive("billing", all())
            .rate(1, Duration::from_mins(1))
    };
    let last = now + Duration::from_mins(4);
    assert_eq!(redrive().dry_run().await.unwrap().last_due_at, Some(last));
    let redriven = redrive().await.unwrap();
    assert_eq!((redriven.messages, redriven.last_due_at), (5, Some(last)));
    // Nobody has to stay: all are in the queue.
    assert_eq!(places(app.pool()).await.1, [0_i64; 0]);
    for due in 1..=5 {
        app.settled().await;
        assert_eq!(bank.seen().len() - before, due);
        app.advance(Duration::from_mins(1)).await;
    }
    // The oldest letter first.
    let order: Vec<i64> = bank.seen()[before..]
        .iter()
        .map(|seen| seen.event_id)
        .collect();
    assert_eq!(order, oldest_first);

    for (messages, per) in [(0, Duration::from_secs(1)), (1, Duration::from_hours(25))] {
        let error = app
            .client()
            .redrive("billing", all())
            .rate(messages, per)
            .await
            .unwrap_err();
        assert!(matches!(error, OperateError::Rate { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_rate_goes_on_over_batches() {
    let app = buried(1_100).await;
    app.freeze().await;
    let redrive = app.client().redrive("billing", all());
    redrive.rate(10, Duration::from_secs(1)).await.unwrap();
    let gaps: Vec<(i64, i64)> = sqlx::query_as(
        "select (extract(epoch from vt - core.now()) * 1000)::bigint, count(*)
         from pgmq.q_core_events_demo__billing group by 1 order by 1",
    )
    .fetch_all(app.pool())
    .await
    .unwrap();
    let expected: Vec<(i64, i64)> = (0..1_100).map(|n| (n * 100, 1)).collect();
    assert_eq!(gaps, expected);
}

#[tokio::test]
async fn a_dry_run_tells_what_would_be_done_and_changes_nothing() {
    let app = buried(12).await;
    let (_, ids) = places(app.pool()).await;
    let snapshot = async || -> String {
        sqlx::query_scalar(
            "select md5(string_agg(l::text, ',' order by msg_id)) from pgmq.q_core_events_demo__billing_dlq l",
        )
        .fetch_one(app.pool())
        .await
        .unwrap()
    };
    let before = snapshot().await;
    let client = app.client();
    let plan = client.redrive("billing", all()).dry_run().await.unwrap();
    assert_eq!((plan.messages, plan.missing, plan.left.len()), (12, 0, 0));
    assert_eq!((plan.handlers.len(), plan.waiting()), (1, 0));
    let plan = client
        .redrive("billing", all())
        .limit(5)
        .dry_run()
        .await
        .unwrap();
    assert_eq!(plan.messages, 5);
    let plan = client
        .redrive("billing", &[1, 2, 77])
        .dry_run()
        .await
        .unwrap();
    assert_eq!((plan.messages, plan.missing), (2, 1));
    let plan = client
        .redrive_edited("billing", 1, &json!(fee(9)))
        .dry_run()
        .await
        .unwrap();
    assert_eq!(plan.messages, 1);
    let plan = client
        .purge_dead_letters("billing", all())
        .dry_run()
        .await
        .unwrap();
    assert_eq!(plan.letters, 12);
    assert_eq!(places(app.pool()).await, (vec![], ids.clone()));
    assert_eq!(snapshot().await, before);

    // A few first, to see whether what was mended is.
    let done = client.redrive("billing", all()).limit(5).await.unwrap();
    assert_eq!(done.messages, 5);
    assert_eq!(
        places(app.pool()).await,
        (ids[..5].to_vec(), ids[5..].to_vec())
    );
}

#[tokio::test]
async fn what_dies_again_meanwhile_is_left() {
    let app = TestApp::start(app(&["remind"], &Bank::default())).await;
    app.client()
        .emit_all(&(1..=20).map(fee).collect::<Vec<_>>())
        .await
        .unwrap();
    app.drained().await;
    // Each is back among the letters as soon as it has been moved.
    let redrive = app.client().redrive("billing", all());
    let redriven = within("the redrive ends", redrive.into_future())
        .await
        .unwrap();
    assert_eq!(redriven.messages, 20);
    app.settled().await;
    let letters = app.dead_letters().await;
    assert_eq!(letters.len(), 20);
    assert!(letters.iter().all(|letter| letter.redrive_count == 1));
}

#[tokio::test]
async fn letters_of_a_handler_that_is_gone_stay_and_of_one_that_is_away_wait() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge", "remind"], &bank)).await;
    app.client().emit(&fee(1)).await.unwrap();
    app.drained().await;
    let database = app.database().clone();
    app.shutdown().await;
    let pool = database.pool().await;
    execute(
        &pool,
        "delete from core.subscriptions where handler = 'remind'",
    )
    .await;

    // Nobody runs at all.
    let client = nexus::Client::connect(
        &nexus::Database::from_url(database.url(), "the test").unwrap(),
        "demo",
    )
    .await
    .unwrap();
    let look = |redriven: &Redriven| {
        let left = &redriven.left[0];
        assert_eq!(left.handler.as_deref(), Some("remind"));
        assert_eq!((left.letters, left.why), (1, LeftWhy::Unsubscribed));
        assert_eq!(redriven.handlers[0].handler.as_deref(), Some("charge"));
        assert!(!redriven.handlers[0].is_live);
        assert_eq!(
            (redriven.messages, redriven.waiting(), redriven.missing),
            (1, 1, 0)
        );
    };
    let ids: Vec<i64> = client
        .dead_letters("billing", 10)
        .await
        .unwrap()
        .iter()
        .map(|letter| letter.id)
        .collect();
    look(&client.redrive("billing", &ids).dry_run().await.unwrap());
    look(&client.redrive("billing", &ids).await.unwrap());
    let letters = client.dead_letters("billing", 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].handler.as_deref(), Some("remind"));

    // A build that has both runs what waits, and what is redriven now; under the new subscription.
    bank.open();
    let app = TestApp::start_on(&database, self::app(&["charge", "remind"], &bank)).await;
    app.settled().await;
    assert_eq!(bank.last().redrives, 1);
    let redriven = app.client().redrive("billing", all()).await.unwrap();
    assert_eq!((redriven.messages, redriven.waiting()), (1, 0));
    app.settled().await;
    let (subscription, current): (i64, i64) = sqlx::query_as(
        "select (l.headers ->> 'subscription')::bigint, s.subscription_id
         from pgmq.q_core_events_demo__billing_dlq l, core.subscriptions s where s.handler = 'remind'",
    )
    .fetch_one(app.pool())
    .await
    .unwrap();
    assert_eq!(subscription, current);
}

#[tokio::test]
async fn an_edited_payload_that_does_not_fit_is_refused_with_its_place() {
    let app = buried(1).await;
    let client = app.client();
    let refused = async |payload: Value| {
        let error = client
            .redrive_edited("billing", 1, &payload)
            .await
            .unwrap_err();
        let EditError::Misfit {
            event_type,
            event_version,
            problems,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(
            (event_type.as_str(), event_version.as_str()),
            ("fee.due", "1")
        );
        assert!(
            error
                .to_string()
                .starts_with("the payload does not fit event type `fee.due` version 1: ")
        );
        problems.to_string()
    };
    let told = refused(json!({"user_id": 1, "amount": "ten", "card": {"number": 4}})).await;
    assert_eq!(
        told,
        "at `amount`: want integer, but got string; at `card.number`: want string, but got number"
    );
    assert!(
        refused(json!({"user_id": 1, "amount": -1}))
            .await
            .starts_with("at `amount`: ")
    );
    let told = refused(json!({"amount": 1})).await;
    assert!(
        told.starts_with("the payload: ") && told.contains("user_id"),
        "{told}"
    );
    refused(Value::Null).await;
    // Where it was, as it was.
    assert_eq!(places(app.pool()).await.1.len(), 1);
    assert_eq!(
        letters(&app, all()).await[0].original["payload"],
        json!(fee(1))
    );
}

#[tokio::test]
async fn an_edit_that_cannot_be_is_refused_with_the_reason() {
    let app =
        TestApp::without_workers(app(&["charge"], &Bank::default()).max_payload_bytes(200)).await;
    bury(&app, 1).await;
    let client = app.client();
    let large = json!({"user_id": 1, "amount": 1, "card": {"number": "9".repeat(200)}});
    let error = client
        .redrive_edited("billing", 1, &large)
        .await
        .unwrap_err();
    assert!(
        matches!(error, EditError::Encode(EncodeError::TooLarge { .. })),
        "{error}"
    );
    let nul = json!({"user_id": 1, "amount": 1, "card": {"number": "a\0b"}});
    let error = client.redrive_edited("billing", 1, &nul).await.unwrap_err();
    assert!(
        matches!(error, EditError::Encode(EncodeError::NulCharacter { .. })),
        "{error}"
    );
    let mut typed = fee(1);
    typed.card = Some(Card {
        number: "\0".to_owned(),
    });
    let error = client
        .redrive_edited_as("billing", 1, &typed)
        .await
        .unwrap_err();
    assert!(
        matches!(error, EditError::Encode(EncodeError::NulCharacter { .. })),
        "{error}"
    );

    let error = client
        .redrive_edited("billing", 7, &json!(fee(1)))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "group `billing` has no dead letter 7");
    let error = client
        .redrive_edited_as("billing", 1, &CouponOffered { user_id: 1 })
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "dead letter 1 is a `fee.due` version 1, the payload is a `coupon.offered` version 1"
    );
    let error = client
        .redrive_edited("nobody", 1, &json!(fee(1)))
        .await
        .unwrap_err();
    assert!(
        matches!(error, EditError::Operate(OperateError::UnknownGroup { .. })),
        "{error}"
    );

    // A version that no app has declared, and a message that is no event.
    execute(
        app.pool(),
        "insert into pgmq.q_core_events_demo__billing_dlq (vt, message, headers)
         select core.now(), message, headers || '{\"eventVersion\": 9}' from pgmq.q_core_events_demo__billing_dlq;
         select pgmq.send('core_events_demo__billing_dlq', '{\"originalEvent\": [], \"reason\": \"Malformed message\"}')",
    )
    .await;
    let error = client
        .redrive_edited("billing", 2, &json!(fee(1)))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, EditError::NoSchema { event_version, .. } if event_version == "9"),
        "{error}"
    );
    let error = client
        .redrive_edited("billing", 3, &json!(fee(1)))
        .await
        .unwrap_err();
    assert!(matches!(error, EditError::NoEvent { id: 3 }), "{error}");
    execute(
        app.pool(),
        "update core.event_types set schema = '{\"$ref\": \"#/nowhere\"}'",
    )
    .await;
    let error = client
        .redrive_edited("billing", 1, &json!(fee(1)))
        .await
        .unwrap_err();
    assert!(matches!(error, EditError::UnusableSchema { .. }), "{error}");
    assert_eq!(letters(&app, all()).await.len(), 3);
}

#[tokio::test]
async fn an_edited_payload_runs_and_everybody_can_tell_that_it_was_edited() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    let event_id = app.client().emit(&fee(1)).await.unwrap();
    app.drained().await;
    let before = bank.last();
    let letter = app.only_dead_letter().await;
    let mut payload = letter.original["payload"].clone();
    payload["amount"] = json!(12);
    let edit = app
        .client()
        .redrive_edited("billing", letter.id, &payload)
        .by("ada");
    assert_eq!(edit.await.unwrap().messages, 1);
    app.drained().await;
    assert_eq!(
        bank.last(),
        Seen {
            amount: 12,
            redrives: 1,
            is_edited: true,
            past_errors: 3,
            ..before.clone()
        }
    );
    let letter = app.only_dead_letter().await;
    assert!(letter.is_edited && letter.redrives[0].edited);
    assert_eq!(letter.redrives[0].by, "ada");

    // Again, typed, and it works.
    bank.open();
    let mended = FeeDue {
        amount: 13,
        ..fee(1)
    };
    let edit = app
        .client()
        .redrive_edited_as("billing", letter.id, &mended);
    assert_eq!(edit.await.unwrap().messages, 1);
    app.drained().await;
    let last = bank.last();
    assert_eq!((last.amount, last.redrives, last.is_edited), (13, 2, true));
    assert_eq!((last.event_id, last.key), (event_id, before.key));
    // The log keeps what was emitted.
    let logged: Value =
        sqlx::query_scalar("select payload from core.event_log where event_id = $1")
            .bind(event_id)
            .fetch_one(app.pool())
            .await
            .unwrap();
    assert_eq!(logged, json!(fee(1)));
    bank.close();
}

#[tokio::test]
async fn what_did_not_decode_runs_once_its_payload_is_mended() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    bank.open();
    execute(
        app.pool(),
        "select core.emit('demo', 'fee.due', '{\"user_id\": \"one\", \"amount\": 5}')",
    )
    .await;
    app.drained().await;
    let letter = app.only_dead_letter().await;
    assert_eq!(letter.reason, "Undecodable payload");
    let payload = json!({"user_id": 1, "amount": 5});
    app.client()
        .redrive_edited("billing", letter.id, &payload)
        .await
        .unwrap();
    app.drained().await;
    assert_eq!(bank.last().amount, 5);
}

#[tokio::test]
async fn a_foreign_message_that_was_refused_is_adopted_anew() {
    let bank = Bank::default();
    let app = TestApp::start(app(&["charge"], &bank)).await;
    bank.open();
    execute(
        app.pool(),
        "select pgmq.send('core_events_demo', '{\"eventType\": \"fee.due\", \"namespace\": \"shop\", \"payload\": {\"user_id\": 1, \"amount\": 5}}'),
                pgmq.send('core_events_demo', '[]')",
    )
    .await;
    app.drained().await;
    let client = app.client();
    let refused = client
        .dead_letters("default", 10)
        .filter(all().without_handler())
        .await
        .unwrap();
    assert_eq!(refused.len(), 2);
    assert_eq!(refused[1].event_type.as_deref(), Some("fee.due"));
    let redrive = || client.redrive("default", all());
    let redriven = redrive().await.unwrap();
    assert_eq!((redriven.messages, redriven.handlers.len()), (2, 1));
    assert_eq!(
        (
            redriven.handlers[0].handler.as_deref(),
            redriven.handlers[0].is_live
        ),
        (None, true)
    );
    app.drained().await;
    // Nothing has changed, so they are refused again, and know it.
    let refused = client.dead_letters("default", 10).await.unwrap();
    assert_eq!(refused.len(), 2);
    assert!(
        refused
            .iter()
            .all(|letter| letter.redrive_count == 1 && letter.redrives.len() == 1)
    );
    assert!(bank.seen().is_empty());

    // Mended by hand, the one is an event like any other.
    execute(
        app.pool(),
        "update pgmq.q_core_events_demo_dlq set message = message #- '{originalEvent,namespace}'
         where message -> 'originalEvent' ? 'namespace'",
    )
    .await;
    redrive().await.unwrap();
    app.drained().await;
    assert_eq!(bank.last().amount, 5);
    assert_eq!(client.dead_letters("default", 10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_letter_that_may_kill_its_process_runs_alone_when_it_is_redriven() {
    let app = buried(3).await;
    execute(
        app.pool(),
        "update pgmq.q_core_events_demo__billing_dlq
         set headers = headers || jsonb_build_object('abandoned', case msg_id when 1 then 10 when 2 then 1 else 0 end)",
    )
    .await;
    app.client().redrive("billing", all()).await.unwrap();
    let headers: Vec<Option<Value>> = sqlx::query_scalar(
        "select headers -> 'abandoned' from pgmq.q_core_events_demo__billing order by msg_id",
    )
    .fetch_all(app.pool())
    .await
    .unwrap();
    // Two losses are what lets a claim take it alone; ten are the end.
    assert_eq!(headers, [Some(json!(2)), None, None]);
}

#[tokio::test]
async fn letters_written_by_hand_disturb_nobody() {
    let app = buried(2).await;
    execute(
        app.pool(),
        r#"insert into pgmq.q_core_events_demo__billing_dlq (vt, message, headers) values
            (now(), null, null), (now(), '[]', '[]'), (now(), '"x"', '"x"'), (now(), '{}', '{}'),
            (now(), '{"originalEvent": 5, "reason": 7, "attempts": "many"}', 'null'),
            (now(), '{"originalEvent": {}}', '{"handler": "charge", "eventVersion": 1, "eventId": "x", "redriven": "x", "redrives": 5, "abandoned": "x"}'),
            (now(), '{"originalEvent": {}}', '{"handler": "charge", "eventVersion": "1e9", "attempts": []}'),
            (now(), '{"originalEvent": null}', '{"handler": 7, "eventVersion": 99999999999999999999}')"#,
    )
    .await;
    let listed = letters(&app, all()).await;
    assert_eq!(listed.len(), 10);
    assert_eq!(
        app.client()
            .dead_letter_summary(all())
            .await
            .unwrap()
            .iter()
            .map(|cause| cause.letters)
            .sum::<u64>(),
        10
    );
    let plan = app
        .client()
        .redrive("billing", all())
        .dry_run()
        .await
        .unwrap();
    let redriven = app.client().redrive("billing", all()).await.unwrap();
    assert_eq!(plan.messages, redriven.messages);
    assert_eq!(plan.left, redriven.left);
    let no_original = redriven
        .left
        .iter()
        .find(|left| left.why == LeftWhy::NoOriginal);
    assert_eq!(
        no_original.map(|left| left.letters),
        Some(4),
        "{redriven:?}"
    );
    let purged = app
        .client()
        .purge_dead_letters("billing", all())
        .await
        .unwrap();
    assert_eq!(purged.letters + redriven.messages, 10);
}

#[tokio::test]
async fn purging_deletes_what_is_meant_and_nothing_else() {
    let app = buried(1_300).await;
    let client = app.client();
    let purged = client
        .purge_dead_letters("billing", &[1, 2, 9_999])
        .await
        .unwrap();
    assert_eq!(purged.letters, 2);
    let none = client
        .purge_dead_letters("billing", all().handler("remind"))
        .await
        .unwrap();
    assert_eq!(none.letters, 0);
    app.advance(Duration::from_hours(2)).await;
    bury(&app, 5).await;
    let old = all().older_than(Duration::from_hours(1));
    assert_eq!(
        client
            .purge_dead_letters("billing", old)
            .await
            .unwrap()
            .letters,
        1_298
    );
    assert_eq!(places(app.pool()).await.1.len(), 5);
    let logged: i64 = sqlx::query_scalar("select count(*) from core.event_log")
        .fetch_one(app.pool())
        .await
        .unwrap();
    assert_eq!(logged, 1_305);
    assert!(client.purge_dead_letters("nobody", all()).await.is_err());
}

#[tokio::test]
async fn letters_are_deleted_when_their_retention_has_passed() {
    let day = Duration::from_hours(24);
    let build = || app(&["charge", "remind"], &Bank::default()).dead_letter_retention(30 * day);
    let first = TestApp::start(build()).await;
    first.client().emit(&fee(1)).await.unwrap();
    execute(first.pool(), "select pgmq.send('core_events_demo', '[]')").await;
    first.drained().await;
    first.advance(20 * day).await;
    first.client().emit(&fee(2)).await.unwrap();
    first.drained().await;
    first.advance(11 * day).await;
    let database = first.database().clone();
    let count = async || -> i64 {
        let client_of_all = "select (select count(*) from pgmq.q_core_events_demo__billing_dlq)
                                  + (select count(*) from pgmq.q_core_events_demo_dlq)";
        sqlx::query_scalar(client_of_all)
            .fetch_one(&database.pool().await)
            .await
            .unwrap()
    };
    assert!(count().await >= 2);
    // A node looks when it starts, and each minute.
    first.shutdown().await;
    let second = TestApp::start_on(&database, build()).await;
    until("the old ones are gone", || async {
        (count().await == 2).then_some(())
    })
    .await;
    let mut left: Vec<i64> = second
        .dead_letters()
        .await
        .iter()
        .map(|letter| letter.original["payload"]["user_id"].as_i64().unwrap())
        .collect();
    left.sort_unstable();
    assert_eq!(left, [2, 2]);
}

#[tokio::test]
async fn an_app_deletes_no_letters_of_other_groups() {
    let day = Duration::from_hours(24);
    let billing = TestApp::start(app(&["remind"], &Bank::default()).name("billing")).await;
    billing.client().emit(&fee(1)).await.unwrap();
    billing.drained().await;
    billing.advance(40 * day).await;
    // The other app's node has looked once it has deleted what is its own.
    let mails = || {
        app(&["offer"], &Bank::default())
            .name("mails")
            .dead_letter_retention(30 * day)
    };
    let other = TestApp::start_on(billing.database(), mails()).await;
    other
        .client()
        .emit(&CouponOffered { user_id: 1 })
        .await
        .unwrap();
    other.drained().await;
    other.shutdown().await;
    billing.advance(40 * day).await;
    let other = TestApp::start_on(billing.database(), mails()).await;
    until("its own is gone", || async {
        other
            .client()
            .dead_letters("mails", 1)
            .await
            .unwrap()
            .is_empty()
            .then_some(())
    })
    .await;
    assert_eq!(
        billing
            .client()
            .dead_letters("billing", 9)
            .await
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test]
async fn letters_from_before_can_be_found_and_redriven_like_new_ones() {
    let database = TestDatabase::new().await;
    let bank = Bank::default();
    let app = TestApp::start_on(&database, app(&["charge"], &bank)).await;
    app.client().emit(&fee(1)).await.unwrap();
    app.drained().await;
    let new = app.only_dead_letter().await;
    app.shutdown().await;
    let options = PgConnectOptions::from_str(database.url()).unwrap();
    let step = nexus_migrations::MIGRATIONS
        .iter()
        .find(|step| step.name.ends_with("_dead_letters"))
        .unwrap();
    let mut connection = PgConnection::connect_with(&options).await.unwrap();
    let indexes = "select string_agg(indexdef, ', ' order by indexname) from pg_indexes
                   where tablename = 'q_core_events_demo__billing_dlq'";
    let newer: String = sqlx::query_scalar(indexes)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    // As the release before has it.
    nexus_migrations::down(&options, step.version - 1)
        .await
        .unwrap();
    let headers: Value =
        sqlx::query_scalar("select headers from pgmq.q_core_events_demo__billing_dlq")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert_eq!(
        (headers.get("fingerprint"), headers.get("eventType")),
        (None, None)
    );
    let older: String = sqlx::query_scalar(indexes)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(older.contains("(vt)") && older != newer, "{older}");
    nexus_migrations::up(&options).await.unwrap();
    let again: String = sqlx::query_scalar(indexes)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(again, newer);

    bank.open();
    let app = TestApp::start_on(&database, self::app(&["charge"], &bank)).await;
    let found = letters(
        &app,
        all()
            .fingerprint(new.fingerprint.unwrap())
            .event_type("fee.due"),
    )
    .await;
    assert_eq!((found.len(), found[0].failed_at), (1, new.failed_at));
    app.client().redrive("billing", &[new.id]).await.unwrap();
    app.drained().await;
    assert_eq!(bank.last().redrives, 1);
}

#[tokio::test]
async fn sql_does_the_same_and_refuses_what_it_does_not_know() {
    let app = buried(3).await;
    for (filter, says) in [
        (
            "{\"handle\": \"x\"}",
            "filter \"handle\" of dead letters is \"x\", expected none of this name",
        ),
        (
            "{\"olderThan\": \"5\"}",
            "expected an interval such as \"2 hours\"",
        ),
        ("{\"from\": \"tomorrow\"}", "expected a time such as"),
        ("{\"ids\": [\"1\"]}", "expected an array of ids"),
        ("[]", "a filter of dead letters is a JSON object, found []"),
    ] {
        for call in [
            "core.purge_dead_letters",
            "core.redrive",
            "core.plan_redrive",
            "core.dead_letters",
        ] {
            let text = format!("select * from {call}('demo', 'billing', '{filter}')");
            let error = sqlx::raw_sql(AssertSqlSafe(text).into_sql_str())
                .execute(app.pool())
                .await
                .unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
    // Nothing in a filter is anything but a value.
    execute(
        app.pool(),
        "select core.purge_dead_letters('demo', 'billing', '{\"handler\": \"x'' or true --\", \"fingerprint\": \"%s %1$I\"}')",
    )
    .await;
    assert_eq!(places(app.pool()).await.1.len(), 3);
    let error = sqlx::query("select core.purge_dead_letters('demo', 'nobody', '{}')")
        .execute(app.pool())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("namespace \"demo\" has no group \"nobody\""),
        "{error}"
    );
    let error = sqlx::query("select core.redrive('demo', 'billing', '{}', p_payload => '{}')")
        .execute(app.pool())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a payload is for a single dead letter"),
        "{error}"
    );

    let (moved, live): (i64, bool) = sqlx::query_as(
        "select letters, is_live from core.redrive('demo', 'billing', '{\"eventType\": \"fee.due\"}', p_limit => 2)",
    )
    .fetch_one(app.pool())
    .await
    .unwrap();
    assert_eq!((moved, live), (2, true));
    let by: String = sqlx::query_scalar(
        "select headers #>> '{redrives,0,by}' from pgmq.q_core_events_demo__billing limit 1",
    )
    .fetch_one(app.pool())
    .await
    .unwrap();
    let user: String = sqlx::query_scalar("select session_user::text")
        .fetch_one(app.pool())
        .await
        .unwrap();
    assert_eq!(by, user);
}

#[tokio::test]
async fn a_queue_of_dead_letters_that_was_dropped_is_made_again() {
    let app = buried(1).await;
    execute(
        app.pool(),
        "select pgmq.drop_queue('core_events_demo__billing_dlq')",
    )
    .await;
    let redriven = app.client().redrive("billing", all()).await.unwrap();
    assert_eq!(redriven, Redriven::default());
    let indexes: i64 = sqlx::query_scalar(
        "select count(*) from pg_indexes where tablename = 'q_core_events_demo__billing_dlq'",
    )
    .fetch_one(app.pool())
    .await
    .unwrap();
    assert_eq!(indexes, 5);
}
