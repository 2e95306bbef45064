//! The backlog of a batch handler with a transaction, which its transactions claim by deleting: each message is
//! handled once, and what a lease is for is done by claims with leases.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use nexus::{Handle, prelude::*, testing::TestDatabase};
use nexus_tests::within;
use sqlx::PgPool;

/// Something to send.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.packed")]
struct Parcel {
    number: i64,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
enum Then {
    Nothing,
    Fail,
    /// End the transaction by a statement.
    Commit,
    /// Take longer than the timeout.
    Hang,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.sent")]
struct Sent {
    number: i64,
}

/// How many batches that were claimed by deleting have not ended well.
type Spoilt = Arc<AtomicU32>;

#[handler(
    group = "post",
    concurrency = 3,
    max_attempts = 2,
    backoff = "fixed(10ms)",
    timeout = "2s"
)]
async fn send(parcels: Batch<Parcel>, tx: &mut Tx, spoilt: State<Spoilt>) -> nexus::Result {
    let numbers: Vec<i64> = parcels.iter().map(|parcel| parcel.number).collect();
    let msg_ids: Vec<i64> = parcels.iter().map(|p| p.meta().message_id()).collect();
    // Claiming has left no settings to the handler's statements.
    let settings: (String, String, String) = sqlx::query_as(
        "select current_setting('enable_seqscan'), current_setting('plan_cache_mode'), current_setting('enable_sort')",
    )
    .fetch_one(&mut **tx)
    .await?;
    assert_eq!(
        settings,
        ("on".to_owned(), "auto".to_owned(), "on".to_owned())
    );
    let is_deleted: bool = sqlx::query_scalar(
        "select not exists (select from pgmq.q_core_events_demo__post where msg_id = any ($1))",
    )
    .bind(msg_ids)
    .fetch_one(&mut **tx)
    .await?;
    sqlx::query("insert into sent (number, is_deleted) select unnest($1::bigint[]), $2")
        .bind(&numbers)
        .bind(is_deleted)
        .execute(&mut **tx)
        .await?;
    tx.emit_all(
        &numbers
            .iter()
            .map(|&number| Sent { number })
            .collect::<Vec<_>>(),
    )?;
    let then = parcels.iter().map(|parcel| parcel.then);
    let Some(then) = then.into_iter().find(|&then| then != Then::Nothing) else {
        return Ok(());
    };
    spoilt.fetch_add(u32::from(is_deleted), Ordering::Relaxed);
    match then {
        Then::Nothing => {}
        Then::Fail => return Err("it does not fit through the slot".into()),
        Then::Commit => {
            sqlx::raw_sql("commit").execute(&mut **tx).await?;
        }
        Then::Hang => std::future::pending().await,
    }
    Ok(())
}

struct Test {
    database: TestDatabase,
    pool: PgPool,
    spoilt: Spoilt,
}

impl Test {
    /// A backlog in which one parcel, far behind what the first claims bring, is special.
    async fn new(parcels: i64, special: Option<(i64, Then)>) -> Self {
        let database = TestDatabase::new().await;
        let pool = database.pool().await;
        sqlx::query("create table sent (number bigint, is_deleted boolean)")
            .execute(&pool)
            .await
            .unwrap();
        let test = Self {
            database,
            pool,
            spoilt: Spoilt::default(),
        };
        // Subscribes, and is gone before there is anything to do.
        test.start().await.shutdown().await;
        let emitter = nexus::Client::connect(
            &nexus::Database::from_url(test.database.url(), "the test").unwrap(),
            "demo",
        )
        .await
        .unwrap();
        let parcels: Vec<Parcel> = (0..parcels)
            .map(|number| Parcel {
                number,
                then: special
                    .filter(|(which, _)| *which == number)
                    .map_or(Then::Nothing, |(_, then)| then),
            })
            .collect();
        emitter.emit_all(&parcels).await.unwrap();
        test
    }

    /// Not by the test kit, which sees every message with its lease.
    async fn start(&self) -> Handle {
        let app = App::discover()
            .name("post")
            .database_url(self.database.url())
            .only(["send"])
            .batch_size(20)
            .state(Arc::clone(&self.spoilt));
        nexus::start(app).await.unwrap()
    }

    /// Runs until nothing is left.
    async fn run(&self) -> nexus::app::HandlerStats {
        let handle = self.start().await;
        within("all is handled", handle.idle()).await.unwrap();
        let mut stats = handle.shutdown().await;
        assert_eq!(stats.len(), 1, "{stats:?}");
        stats.remove(0)
    }

    /// Not again and again: the messages are claimed with leases then.
    fn is_spoilt_at_most_once_a_slot(&self) {
        let spoilt = self.spoilt.load(Ordering::Relaxed);
        assert!((1..=3).contains(&spoilt), "{spoilt} batches");
    }

    /// The numbers of what was sent, in order, those that were claimed by deleting, and those whose follow-up is
    /// in the log.
    async fn sent(&self) -> (Vec<i64>, usize, Vec<i64>) {
        let sent: Vec<(i64, bool)> =
            sqlx::query_as("select number, is_deleted from sent order by number")
                .fetch_all(&self.pool)
                .await
                .unwrap();
        let followed = sqlx::query_scalar(
            "select (payload ->> 'number')::bigint from core.event_log
             where event_type = 'parcel.sent' order by 1",
        );
        let followed = followed.fetch_all(&self.pool).await.unwrap();
        let deleted = sent.iter().filter(|(_, is_deleted)| *is_deleted).count();
        (
            sent.iter().map(|(number, _)| *number).collect(),
            deleted,
            followed,
        )
    }

    async fn letters(&self) -> Vec<(i64, String, i32, String)> {
        sqlx::query_as(
            "select (message -> 'originalEvent' -> 'payload' ->> 'number')::bigint, message ->> 'reason',
                 (message ->> 'attempts')::int, message ->> 'error'
             from pgmq.q_core_events_demo__post_dlq",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap()
    }
}

fn without(parcels: i64, special: i64) -> Vec<i64> {
    (0..parcels).filter(|number| *number != special).collect()
}

#[tokio::test]
async fn each_message_is_handled_once_on_two_nodes() {
    const PARCELS: i64 = 2_000;
    let test = Test::new(PARCELS, None).await;
    let (one, two) = tokio::join!(test.run(), test.run());
    assert_eq!(
        one.completed + two.completed,
        PARCELS as u64,
        "{one:?} {two:?}"
    );
    let (sent, deleted, followed) = test.sent().await;
    assert_eq!(sent, (0..PARCELS).collect::<Vec<i64>>());
    assert_eq!(followed, sent);
    assert!(deleted > 0, "all were claimed with leases");
}

#[tokio::test]
async fn a_message_that_fails_is_alone_in_failing() {
    let test = Test::new(600, Some((400, Then::Fail))).await;
    let stats = test.run().await;
    assert_eq!(
        (stats.completed, stats.retried, stats.dead_lettered),
        (599, 1, 1),
        "{stats:?}"
    );
    let (sent, deleted, followed) = test.sent().await;
    assert_eq!((&sent, &followed), (&without(600, 400), &sent));
    assert!(deleted > 0, "all were claimed with leases");
    test.is_spoilt_at_most_once_a_slot();
    let letters = test.letters().await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    // The batch that was rolled back counts as no attempt.
    assert_eq!((letters[0].0, letters[0].2), (400, 2), "{letters:?}");
}

#[tokio::test]
async fn a_batch_that_takes_too_long_is_rolled_back_and_split() {
    let test = Test::new(600, Some((400, Then::Hang))).await;
    let stats = test.run().await;
    assert_eq!(
        (stats.completed, stats.dead_lettered),
        (599, 1),
        "{stats:?}"
    );
    let (sent, _, followed) = test.sent().await;
    assert_eq!((&sent, &followed), (&without(600, 400), &sent));
    test.is_spoilt_at_most_once_a_slot();
    let letters = test.letters().await;
    assert!(letters[0].3.contains("timed out"), "{letters:?}");
}

#[tokio::test]
async fn a_handler_that_commits_by_hand_takes_no_message_along() {
    let test = Test::new(600, Some((400, Then::Commit))).await;
    let stats = test.run().await;
    assert_eq!(
        (stats.completed, stats.dead_lettered),
        (599, 1),
        "{stats:?}"
    );
    // Its own commits stand, those of the calls that it spoilt among them; no follow-up is stored with those.
    let (_, _, followed) = test.sent().await;
    assert_eq!(followed, without(600, 400));
    test.is_spoilt_at_most_once_a_slot();
    let letters = test.letters().await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert!(
        letters[0].3.contains("ended its transaction"),
        "{letters:?}"
    );
}
