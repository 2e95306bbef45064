//! A handler or scheduled task that says what it was called before keeps what it had: messages, dead
//! letters, its subscription, its history. Whatever else runs, starts again or dies meanwhile.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use nexus::{StartError, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::PgPool;
use tokio::sync::{Notify, mpsc};

/// An order was paid.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid")]
struct OrderPaid {
    number: u32,
}

/// Something else.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.refunded")]
struct OrderRefunded {
    number: u32,
}

/// Who handled which order.
type Saw = mpsc::UnboundedSender<(&'static str, u32)>;

/// The delivery keys of all attempts.
#[derive(Clone, Default)]
struct Keys(Arc<Mutex<Vec<String>>>);

/// Holds up `send_order`.
#[derive(Clone, Default)]
struct Gate(Option<Arc<Notify>>);

/// As the old build has it.
#[handler]
async fn send_order(order: OrderPaid, saw: State<Saw>, gate: State<Gate>) {
    if let Some(gate) = &gate.0 {
        let _ = saw.send(("holds", order.number));
        gate.notified().await;
    }
    let _ = saw.send(("old", order.number));
}

/// As the new build has it.
#[handler(formerly = "send_order")]
async fn ship_order(order: OrderPaid, saw: State<Saw>) {
    let _ = saw.send(("new", order.number));
}

/// As a later build has it.
#[handler(formerly = ["ship_order", "send_order"])]
async fn dispatch_order(order: OrderPaid, saw: State<Saw>) {
    let _ = saw.send(("newer", order.number));
}

#[handler]
async fn charge(order: Envelope<OrderPaid>, keys: State<Keys>) -> nexus::Result {
    keys.0.lock().unwrap().push(order.delivery_key());
    if order.number == 1 {
        return Err(Error::permanent("refused"));
    }
    Err(Error::snooze(Duration::ZERO))
}

#[handler(formerly = "charge")]
async fn charge_card(order: Envelope<OrderPaid>, keys: State<Keys>, saw: State<Saw>) {
    keys.0.lock().unwrap().push(order.delivery_key());
    let _ = saw.send(("charged", order.number));
}

#[cron("@daily")]
async fn nightly(saw: State<Saw>) {
    let _ = saw.send(("old nightly", 0));
}

#[cron("@daily", formerly = "nightly")]
async fn tidy_up(tick: Tick, saw: State<Saw>) {
    assert!(tick.due_at() <= jiff_now());
    let _ = saw.send(("new nightly", 0));
}

/// It is time for the digest.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "digest.due")]
struct DigestDue {
    full: bool,
}

#[cron("@daily", name = "send_digest")]
const OLD_DIGEST: DigestDue = DigestDue { full: false };

#[cron("@daily", name = "digest", formerly = "send_digest")]
const DIGEST: DigestDue = DigestDue { full: true };

fn jiff_now() -> nexus::jiff::Timestamp {
    // A tick that was fired by hand is due when it was fired.
    nexus::jiff::Timestamp::now() + nexus::jiff::SignedDuration::from_secs(60)
}

#[handler(formerly = "send_order")]
async fn refund(refunded: OrderRefunded, saw: State<Saw>) {
    let _ = saw.send(("refunded", refunded.number));
}

fn build(database: &TestDatabase, handlers: &[&str], saw: &Saw) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .name("shop")
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
        .state(saw.clone())
        .state(Keys::default())
        .state(Gate::default())
}

/// Starts and stops a build, which leaves its subscriptions behind.
async fn was_deployed(app: App) {
    nexus::start(app).await.unwrap().shutdown().await;
}

async fn emit(pool: &PgPool, numbers: impl IntoIterator<Item = u32>) {
    for number in numbers {
        sqlx::query(
            "select core.emit('demo', 'order.paid', jsonb_build_object('number', $1::bigint))",
        )
        .bind(i64::from(number))
        .execute(pool)
        .await
        .unwrap();
    }
}

/// What handlers reported, sorted by number.
fn seen(saw: &mut mpsc::UnboundedReceiver<(&'static str, u32)>) -> Vec<(&'static str, u32)> {
    let mut seen: Vec<_> = std::iter::from_fn(|| saw.try_recv().ok()).collect();
    seen.sort_unstable_by_key(|&(who, number)| (number, who));
    seen
}

async fn subscriptions(pool: &PgPool) -> Vec<(i64, String)> {
    sqlx::query_as("select subscription_id, handler from core.subscriptions order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_renamed_handler_keeps_its_messages_and_its_subscription() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    let before = subscriptions(&pool).await;
    emit(&pool, 1..=3).await;

    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    new.client().emit(&OrderPaid { number: 4 }).await.unwrap();
    within("all is settled", new.idle()).await.unwrap();
    assert_eq!(
        seen(&mut saw),
        [("new", 1), ("new", 2), ("new", 3), ("new", 4)]
    );
    let after = subscriptions(&pool).await;
    assert_eq!(after, [(before[0].0, "ship_order".to_owned())]);
    new.shutdown().await;
}

#[tokio::test]
async fn a_handler_that_was_renamed_twice_has_what_waited_under_either_name() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    emit(&pool, [1]).await;
    // Never ran for long enough to move anything, or was skipped by this database altogether.
    was_deployed(build(&database, &["ship_order"], &sender)).await;
    emit(&pool, [2]).await;
    let new = nexus::start(build(&database, &["dispatch_order"], &sender))
        .await
        .unwrap();
    within("all is settled", new.idle()).await.unwrap();
    let numbers: Vec<u32> = seen(&mut saw).iter().map(|seen| seen.1).collect();
    assert_eq!(numbers, [1, 2], "each once");
    assert_eq!(subscriptions(&pool).await.len(), 1);
    new.shutdown().await;
}

#[tokio::test]
async fn an_old_node_finishes_what_it_holds_and_gets_no_more() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let gate = Arc::new(Notify::new());
    let held = build(&database, &["send_order"], &sender).state(Gate(Some(Arc::clone(&gate))));
    let old = nexus::start(held).await.unwrap();
    emit(&pool, [1]).await;
    assert_eq!(within("it is held", saw.recv()).await, Some(("holds", 1)));

    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    emit(&pool, 2..=20).await;
    // A rollout may last: the old build starts once more, and reverts nothing.
    let restarted = nexus::start(build(&database, &["send_order"], &sender))
        .await
        .unwrap();
    assert_eq!(subscriptions(&pool).await[0].1, "ship_order");
    for _ in 2..=20 {
        let (who, _) = within("the new build handles it", saw.recv())
            .await
            .unwrap();
        assert_eq!(who, "new");
    }
    gate.notify_one();
    assert_eq!(
        within("the old one ends", saw.recv()).await,
        Some(("old", 1))
    );
    within("all is settled", new.idle()).await.unwrap();
    assert_eq!(seen(&mut saw), [], "something ran twice");
    let names: Vec<String> = subscriptions(&pool)
        .await
        .into_iter()
        .map(|s| s.1)
        .collect();
    assert_eq!(names, ["ship_order"]);
    for node in [old, restarted, new] {
        node.shutdown().await;
    }
}

#[tokio::test]
async fn what_an_open_transaction_emitted_before_the_rename_arrives_after_it() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    let mut open = pool.begin().await.unwrap();
    sqlx::query("select core.emit('demo', 'order.paid', '{\"number\": 1}')")
        .execute(&mut *open)
        .await
        .unwrap();
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    emit(&pool, [2]).await;
    assert_eq!(
        within("the later one runs", saw.recv()).await,
        Some(("new", 2))
    );
    open.commit().await.unwrap();
    assert_eq!(
        within("the straggler runs", saw.recv()).await,
        Some(("new", 1))
    );
    within("all is settled", new.idle()).await.unwrap();
    assert_eq!(seen(&mut saw), []);
    new.shutdown().await;
}

#[tokio::test]
async fn a_node_that_dies_after_the_rename_leaves_the_rest_to_the_next_one() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    emit(&pool, 1..=10).await;
    // Nothing can be moved or claimed while this is held.
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("lock table pgmq.q_core_events_demo__shop in exclusive mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    let doomed = build(&database, &["ship_order"], &sender);
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let node = runtime.block_on(nexus::start(doomed)).unwrap();
        // As a process ends that is killed: nothing is given back, nobody deregisters.
        runtime.shutdown_background();
        drop(node);
    })
    .join()
    .unwrap();
    let waiting: Vec<String> = sqlx::query_scalar(
        "select distinct headers ->> 'handler' from pgmq.q_core_events_demo__shop",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(waiting, ["send_order"]);
    assert_eq!(subscriptions(&pool).await[0].1, "ship_order");
    lock.rollback().await.unwrap();

    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    within("all is settled", new.idle()).await.unwrap();
    let expected: Vec<(&str, u32)> = (1..=10).map(|number| ("new", number)).collect();
    assert_eq!(seen(&mut saw), expected);
    new.shutdown().await;
}

#[tokio::test]
async fn a_build_from_before_the_rename_takes_it_back() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order", "nightly"], &sender)).await;
    let task = |name: &'static str| {
        sqlx::query_scalar::<_, uuid::Uuid>(
            "select task_id from core.scheduled_tasks where name = $1",
        )
        .bind(name)
        .fetch_one(&pool)
    };
    let (nightly, before) = (task("nightly").await.unwrap(), subscriptions(&pool).await);
    was_deployed(build(&database, &["ship_order", "tidy_up"], &sender)).await;
    emit(&pool, [1]).await;
    sqlx::query("select core.run_scheduled_task($1)")
        .bind(nightly)
        .execute(&pool)
        .await
        .unwrap();

    let old = nexus::start(build(&database, &["send_order", "nightly"], &sender))
        .await
        .unwrap();
    emit(&pool, [2]).await;
    let old_idle = || async { (waiting(&old).await == 0).then_some(()) };
    until("all is settled", old_idle).await;
    assert_eq!(seen(&mut saw), [("old nightly", 0), ("old", 1), ("old", 2)]);
    assert_eq!(subscriptions(&pool).await, before);
    assert_eq!(task("nightly").await.unwrap(), nightly);
    old.shutdown().await;

    // And once more forward: what the old build has handled is not handled again.
    emit(&pool, [3]).await;
    let new = nexus::start(build(&database, &["ship_order", "tidy_up"], &sender))
        .await
        .unwrap();
    within("all is settled", new.idle()).await.unwrap();
    assert_eq!(seen(&mut saw), [("new", 3)]);
    assert_eq!(task("tidy_up").await.unwrap(), nightly);
    new.shutdown().await;
}

#[tokio::test]
async fn a_task_that_emits_is_renamed_back_with_its_pause() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let tasks = async || -> Vec<(uuid::Uuid, String, bool, bool)> {
        sqlx::query_as(
            "select task_id, name, payload = '{\"full\": true}', paused_at is not null
             from core.scheduled_tasks order by name",
        )
        .fetch_all(&pool)
        .await
        .unwrap()
    };
    let (old, new) = (["send_digest"], ["digest"]);
    was_deployed(build(&database, &old, &sender)).await;
    let task = tasks().await[0].0;
    let named = |name: &str, full, paused| vec![(task, name.to_owned(), full, paused)];
    assert_eq!(tasks().await, named("send_digest", false, false));
    was_deployed(build(&database, &new, &sender)).await;
    assert_eq!(tasks().await, named("digest", true, false));

    // Somebody pauses it, and the release is rolled back.
    let running = nexus::start(build(&database, &new, &sender)).await.unwrap();
    running.client().pause_schedule("digest").await.unwrap();
    running.shutdown().await;
    was_deployed(build(&database, &old, &sender)).await;
    assert_eq!(tasks().await, named("send_digest", false, true));

    // And forward, and back once more.
    was_deployed(build(&database, &new, &sender)).await;
    assert_eq!(tasks().await, named("digest", true, true));
    was_deployed(build(&database, &old, &sender)).await;
    assert_eq!(tasks().await, named("send_digest", false, true));
    assert!(OLD_DIGEST.full != DIGEST.full);
}

/// Messages that wait for any handler of the namespace, or are being handled.
async fn waiting(node: &nexus::Handle) -> i64 {
    let subscriptions = node.client().subscriptions().await.unwrap();
    subscriptions.iter().map(|s| s.waiting).sum()
}

#[tokio::test]
async fn an_event_that_was_sent_to_both_names_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    emit(&pool, [1, 2]).await;
    subscribe(&pool, "ship_order").await;
    emit(&pool, [3, 4]).await;

    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    emit(&pool, [5]).await;
    within("all is settled", new.idle()).await.unwrap();
    let expected: Vec<(&str, u32)> = (1..=5).map(|number| ("new", number)).collect();
    assert_eq!(seen(&mut saw), expected);
    let names: Vec<String> = subscriptions(&pool)
        .await
        .into_iter()
        .map(|s| s.1)
        .collect();
    assert_eq!(names, ["ship_order"]);
    assert_eq!(waiting(&new).await, 0);
    new.shutdown().await;
}

/// What a build does that has this name and says nothing of a former one.
async fn subscribe(pool: &PgPool, handler: &str) {
    sqlx::query("select core.subscribe('demo', 'shop', jsonb_build_array(jsonb_build_object('group', 'shop', 'handler', $1::text, 'eventType', 'order.paid')))")
        .bind(handler)
        .execute(pool)
        .await
        .unwrap();
}

/// Emits order 1 in a transaction that stays open.
async fn emit_later(pool: &PgPool) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut open = pool.begin().await.unwrap();
    sqlx::query("select core.emit('demo', 'order.paid', '{\"number\": 1}')")
        .execute(&mut *open)
        .await
        .unwrap();
    open
}

/// Sends all that the clean cuts owe.
async fn settle(pool: &PgPool) {
    until("the subscriptions settle", || async {
        sqlx::query("select core.settle_subscriptions('demo')")
            .execute(pool)
            .await
            .unwrap();
        let open: i64 = sqlx::query_scalar(
            "select count(*) from core.subscriptions where since_snapshot is not null",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (open == 0).then_some(())
    })
    .await;
}

/// Waits until nothing waits and nothing is owed; then order 1 has run once, by the handler `who`.
async fn assert_ran_once(
    node: &nexus::Handle,
    pool: &PgPool,
    saw: &mut mpsc::UnboundedReceiver<(&'static str, u32)>,
    who: &'static str,
) {
    settle(pool).await;
    until("no message is left", || async {
        let left: i64 = sqlx::query_scalar(
            "select count(*) from pgmq.q_core_events_demo__shop where not headers ? 'settled'",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (left == 0).then_some(())
    })
    .await;
    within("all is settled", node.idle()).await.unwrap();
    assert_eq!(seen(saw), [(who, 1)]);
    assert_eq!(subscriptions(pool).await.len(), 1);
}

#[tokio::test]
async fn an_event_that_is_owed_to_the_new_name_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    let open = emit_later(&pool).await;
    subscribe(&pool, "ship_order").await;
    open.commit().await.unwrap();
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    assert_ran_once(&new, &pool, &mut saw, "new").await;
    new.shutdown().await;
}

#[tokio::test]
async fn an_event_that_was_owed_to_the_new_name_and_sent_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    let open = emit_later(&pool).await;
    subscribe(&pool, "ship_order").await;
    open.commit().await.unwrap();
    settle(&pool).await;
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    assert_ran_once(&new, &pool, &mut saw, "new").await;
    new.shutdown().await;
}

#[tokio::test]
async fn an_event_that_commits_after_both_names_became_one_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    let open = emit_later(&pool).await;
    subscribe(&pool, "ship_order").await;
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    open.commit().await.unwrap();
    assert_ran_once(&new, &pool, &mut saw, "new").await;
    new.shutdown().await;
}

#[tokio::test]
async fn an_event_that_was_owed_to_the_former_name_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["charge"], &sender)).await;
    subscribe(&pool, "ship_order").await;
    sqlx::query("delete from core.subscriptions where handler = 'charge'")
        .execute(&pool)
        .await
        .unwrap();
    let open = emit_later(&pool).await;
    subscribe(&pool, "send_order").await;
    open.commit().await.unwrap();
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    assert_ran_once(&new, &pool, &mut saw, "new").await;
    new.shutdown().await;
}

#[tokio::test]
async fn an_event_from_before_both_names_were_subscribed_is_not_left_out() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    emit(&pool, [1]).await;
    subscribe(&pool, "ship_order").await;
    let new = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap();
    assert_ran_once(&new, &pool, &mut saw, "new").await;
    new.shutdown().await;
}

#[tokio::test]
async fn an_event_under_the_name_before_the_former_one_runs_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    subscribe(&pool, "dispatch_order").await;
    emit(&pool, [1]).await;
    // As a build of `ship_order` leaves it that is killed before it moves anything.
    sqlx::raw_sql(
        "update core.subscriptions set handler = 'ship_order' where handler = 'send_order';
         insert into core.renames (namespace, group_name, former, handler)
         values ('demo', 'shop', 'send_order', 'ship_order')",
    )
    .execute(&pool)
    .await
    .unwrap();
    let new = nexus::start(build(&database, &["dispatch_order"], &sender))
        .await
        .unwrap();
    assert_ran_once(&new, &pool, &mut saw, "newer").await;
    new.shutdown().await;
}

#[tokio::test]
async fn dead_letters_follow_and_the_key_of_a_delivery_stays() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let keys = Keys::default();
    let old = nexus::start(build(&database, &["charge"], &sender).state(keys.clone()))
        .await
        .unwrap();
    emit(&pool, [1, 2]).await;
    until("one is a dead letter, one was tried", || async {
        let letters = old.client().dead_letters("shop", 10).await.unwrap();
        let tried = keys.0.lock().unwrap().iter().any(|key| key.contains("/2/"));
        (letters.len() == 1 && tried).then_some(())
    })
    .await;
    old.shutdown().await;

    let new = nexus::start(build(&database, &["charge_card"], &sender).state(keys.clone()))
        .await
        .unwrap();
    assert_eq!(
        within("it is tried again", saw.recv()).await,
        Some(("charged", 2))
    );
    let letter = until("the dead letter follows", || async {
        let letters = new.client().dead_letters("shop", 10).await.unwrap();
        let letter = letters.into_iter().next().expect("it is not lost");
        (letter.handler.as_deref() == Some("charge_card")).then_some(letter)
    })
    .await;
    new.client().redrive("shop", &[letter.id]).await.unwrap();
    assert_eq!(
        within("the letter runs", saw.recv()).await,
        Some(("charged", 1))
    );
    let mut keys = keys.0.lock().unwrap().clone();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys, ["demo/1/shop/charge", "demo/2/shop/charge"]);
    new.shutdown().await;
}

#[tokio::test]
async fn a_letter_of_the_old_name_that_is_redriven_runs() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let old = nexus::start(build(&database, &["charge"], &sender))
        .await
        .unwrap();
    emit(&pool, [1]).await;
    let letter = until("it is a dead letter", || async {
        let letters = old.client().dead_letters("shop", 10).await.unwrap();
        letters.into_iter().next()
    })
    .await;
    old.shutdown().await;
    was_deployed(build(&database, &["charge_card"], &sender)).await;
    // As a backup has it, or an operator who was slow.
    let again = "update pgmq.q_core_events_demo__shop_dlq
                 set headers = headers || '{\"handler\": \"charge\"}', enqueued_at = now() - interval '1 day'";
    sqlx::query(again).execute(&pool).await.unwrap();
    sqlx::query("update core.renames set letters_until = 1000")
        .execute(&pool)
        .await
        .unwrap();
    let new = nexus::start(build(&database, &["charge_card"], &sender))
        .await
        .unwrap();
    new.client().redrive("shop", &[letter.id]).await.unwrap();
    assert_eq!(
        within("the letter runs", saw.recv()).await,
        Some(("charged", 1))
    );
    new.shutdown().await;
}

#[tokio::test]
async fn a_renamed_cron_function_keeps_its_task_its_ticks_and_what_waits() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["nightly"], &sender)).await;
    let task = || {
        sqlx::query_as::<_, (uuid::Uuid, String, String, bool, i64, i64)>(
            "select task_id, name, event_type, active, (extract(epoch from next_run_at))::bigint,
                    (select count(*) from core.ticks k where k.task_id = t.task_id)
             from core.scheduled_tasks t",
        )
        .fetch_one(&pool)
    };
    let (id, _, _, _, next_run_at, _) = task().await.unwrap();
    sqlx::query("select core.run_scheduled_task($1)")
        .bind(id)
        .execute(&pool)
        .await
        .unwrap();

    let new = nexus::start(build(&database, &["tidy_up"], &sender))
        .await
        .unwrap();
    assert_eq!(
        within("the queued tick runs", saw.recv()).await,
        Some(("new nightly", 0))
    );
    let expected = (
        id,
        "tidy_up".to_owned(),
        "tick.shop.tidy_up".to_owned(),
        true,
        next_run_at,
        1,
    );
    assert_eq!(task().await.unwrap(), expected);
    // Later ticks are the new function's as well.
    sqlx::query("select core.run_scheduled_task($1)")
        .bind(id)
        .execute(&pool)
        .await
        .unwrap();
    assert_eq!(
        within("the next tick runs", saw.recv()).await,
        Some(("new nightly", 0))
    );
    within("all is settled", new.idle()).await.unwrap();
    assert_eq!(new.shutdown().await[0].dead_lettered, 0);
}

#[tokio::test]
async fn a_former_name_of_another_event_keeps_what_it_has() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["send_order"], &sender)).await;
    emit(&pool, [1]).await;
    let new = nexus::start(build(&database, &["refund"], &sender))
        .await
        .unwrap();
    new.client()
        .emit(&OrderRefunded { number: 2 })
        .await
        .unwrap();
    assert_eq!(within("it runs", saw.recv()).await, Some(("refunded", 2)));
    new.shutdown().await;
    let names: Vec<String> = subscriptions(&pool)
        .await
        .into_iter()
        .map(|s| s.1)
        .collect();
    assert_eq!(names, ["send_order", "refund"]);
    let old = nexus::start(build(&database, &["send_order"], &sender))
        .await
        .unwrap();
    assert_eq!(within("it has waited", saw.recv()).await, Some(("old", 1)));
    old.shutdown().await;
}

#[tokio::test]
async fn a_name_that_is_a_handler_again_keeps_its_own_messages() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    was_deployed(build(&database, &["charge"], &sender)).await;
    was_deployed(build(&database, &["charge_card"], &sender)).await;
    // Another build, where the former name is a handler beside the one that had it: both get it.
    sqlx::query("select core.subscribe('demo', 'shop', '[{\"group\": \"shop\", \"handler\": \"charge\", \"eventType\": \"order.paid\"}]')")
        .execute(&pool)
        .await
        .unwrap();
    emit(&pool, [2]).await;
    let keys = Keys::default();
    let old = nexus::start(build(&database, &["charge"], &sender).state(keys.clone()))
        .await
        .unwrap();
    until("its own message runs", || async {
        (!keys.0.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    assert_eq!(seen(&mut saw), []);
    old.shutdown().await;
}

#[tokio::test]
async fn a_former_name_that_another_live_app_runs_is_refused() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    // In one group by the names of the apps: `shop` is the group of handlers that name none.
    let other = build(&database, &["send_order"], &sender).node_id("a");
    let other = nexus::start(other).await.unwrap();
    let pool = database.pool().await;
    sqlx::query("update core.nodes set app = 'warehouse'; ")
        .execute(&pool)
        .await
        .unwrap();
    let error = nexus::start(build(&database, &["ship_order"], &sender))
        .await
        .unwrap_err();
    let StartError::Conflict {
        what,
        other: by,
        advice,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        what,
        "handler `send_order` of group `shop` (here it is in `formerly`)"
    );
    assert_eq!(
        (by.as_str(), *advice),
        (
            "warehouse",
            "take the name out of `formerly`, or stop the other app first"
        )
    );
    other.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roll_outs_and_a_roll_back_under_load_lose_and_double_nothing() {
    const EVENTS: u32 = 400;
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let start = |handler| nexus::start(build(&database, &[handler], &sender));
    let old = start("send_order").await.unwrap();
    let steps = 3;
    let (emitted, mut next_step) = mpsc::unbounded_channel();
    let emitting = tokio::spawn({
        let pool = pool.clone();
        async move {
            for number in 0..EVENTS {
                // Some of them in transactions that stay open across a deployment.
                let mut tx = pool.begin().await.unwrap();
                sqlx::query("select core.emit('demo', 'order.paid', jsonb_build_object('number', $1::bigint))")
                    .bind(i64::from(number))
                    .execute(&mut *tx)
                    .await
                    .unwrap();
                if (number + 1) % (EVENTS / (steps + 1)) == 0 {
                    let (done, deployed) = tokio::sync::oneshot::channel();
                    emitted.send(done).unwrap();
                    within("the next build is there", deployed).await.unwrap();
                }
                tx.commit().await.unwrap();
            }
        }
    });
    let mut node = old;
    for handler in ["ship_order", "send_order", "dispatch_order"] {
        let done = within("more is emitted", next_step.recv()).await.unwrap();
        // The build before it is superseded, or gone if this one is older.
        if handler == "send_order" {
            node.shutdown().await;
            node = start(handler).await.unwrap();
        } else {
            let next = start(handler).await.unwrap();
            node.shutdown().await;
            node = next;
        }
        done.send(()).unwrap();
    }
    let last = within("more is emitted", next_step.recv()).await.unwrap();
    last.send(()).unwrap();
    within("all is emitted", emitting).await.unwrap();
    within("all is settled", node.idle()).await.unwrap();
    let numbers: Vec<u32> = seen(&mut saw).iter().map(|seen| seen.1).collect();
    let expected: Vec<u32> = (0..EVENTS).collect();
    assert!(
        numbers == expected,
        "{} of {EVENTS} were handled, {} of them twice",
        numbers.len(),
        numbers.windows(2).filter(|pair| pair[0] == pair[1]).count()
    );
    assert_eq!(subscriptions(&pool).await.len(), 1);
    node.shutdown().await;
}
