//! What one client emits at the same time shares statements and commits, and each event is stored or refused for itself.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use nexus::{Client, Database, EmitError, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::{Connection as _, PgConnection, PgPool};

/// A car has passed.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "car.passed")]
struct CarPassed {
    n: i64,
}

struct Test {
    _database: TestDatabase,
    client: Client,
    pool: PgPool,
    /// Another session than those of the client.
    other: PgConnection,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let target = Database::from_url(database.url(), "the test").unwrap();
        Self {
            client: Client::connect(&target, "demo").await.unwrap(),
            pool: database.pool().await,
            other: PgConnection::connect(database.url()).await.unwrap(),
            _database: database,
        }
    }

    /// The numbers and ids that are in the log, by number.
    async fn logged(&self) -> Vec<(i64, i64)> {
        sqlx::query_as(
            "select (payload ->> 'n')::bigint, event_id from core.event_log where event_type = 'car.passed'
             order by 1, 2",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap()
    }

    async fn emit(client: Client, n: i64) -> Result<i64, EmitError> {
        client.emit(&CarPassed { n }).await
    }
}

async fn waiting_for_locks(pool: &PgPool, statements: i64) {
    until("statements wait", || async {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_locks l join pg_database d on d.oid = l.database
             where not l.granted and d.datname = current_database()",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (waiting == statements).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_is_emitted_at_once_shares_commits_and_each_gets_its_own_id() {
    let test = Test::new().await;
    let emits = (0..300).map(|n| Test::emit(test.client.clone(), n));
    let ids = within("all are stored", join_all(emits)).await;
    let expected: Vec<(i64, i64)> = (0..).zip(ids.into_iter().map(Result::unwrap)).collect();
    assert_eq!(test.logged().await, expected);
    let transactions: i64 = sqlx::query_scalar(
        "select count(distinct tx_id::text) from core.event_log where event_type = 'car.passed'",
    )
    .fetch_one(&test.pool)
    .await
    .unwrap();
    assert!((1..=10).contains(&transactions), "{transactions}");
}

#[tokio::test]
async fn one_that_is_refused_does_not_take_the_others_along() {
    let test = Test::new().await;
    // A rule of the house, which a trigger or a constraint may hold events to.
    sqlx::query("alter table core.event_log add constraint no_bad_luck check (payload ->> 'n' not in ('13', '77'))")
        .execute(&test.pool)
        .await
        .unwrap();
    let emits = (0..100).map(|n| Test::emit(test.client.clone(), n));
    let stored = within("all are answered", join_all(emits)).await;
    for (n, stored) in (0..).zip(&stored) {
        match stored {
            Ok(_) => assert!(n != 13 && n != 77, "{n}"),
            Err(EmitError::Append { source }) => {
                assert!(n == 13 || n == 77, "{n}: {source}");
                assert!(source.to_string().contains("no_bad_luck"), "{source}");
            }
            Err(error) => panic!("{n}: {error}"),
        }
    }
    let logged: BTreeSet<i64> = test.logged().await.into_iter().map(|(n, _)| n).collect();
    assert_eq!(logged.len(), 98);
    assert_eq!(test.logged().await.len(), 98);
}

#[tokio::test]
async fn who_gives_up_takes_nobody_along() {
    let mut test = Test::new().await;
    Test::emit(test.client.clone(), 0).await.unwrap();
    let mut lock = test.other.begin().await.unwrap();
    sqlx::query("lock table core.event_log in share mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    let spawn = |n| tokio::spawn(Test::emit(test.client.clone(), n));
    // Two statements are under way, the others wait for them.
    let first = [spawn(1), spawn(2)];
    waiting_for_locks(&test.pool, 2).await;
    let mut given_up = Box::pin(Test::emit(test.client.clone(), 3));
    let mut kept = Box::pin(Test::emit(test.client.clone(), 4));
    assert!(futures_util::poll!(&mut given_up).is_pending());
    assert!(futures_util::poll!(&mut kept).is_pending());
    drop(given_up);
    first[0].abort();
    let [one, two] = first;
    assert!(one.await.unwrap_err().is_cancelled());
    lock.rollback().await.unwrap();
    within("the others are stored", async {
        two.await.unwrap().unwrap();
        kept.await.unwrap();
    })
    .await;
    // What was under way when its emitter gave up may have been stored, what waited has not.
    let logged: Vec<i64> = test.logged().await.into_iter().map(|(n, _)| n).collect();
    assert_eq!(logged, [0, 1, 2, 4]);
}

#[tokio::test]
async fn a_future_that_rests_holds_nobody_up() {
    let test = Test::new().await;
    // Each is sent when it is looked at first, and then not looked at again for a while.
    let mut resting: Vec<_> = (0..20)
        .map(|n| Box::pin(Test::emit(test.client.clone(), n)))
        .collect();
    for future in &mut resting {
        assert!(futures_util::poll!(future).is_pending());
    }
    within("another is stored", Test::emit(test.client.clone(), 20))
        .await
        .unwrap();
    within("all are stored", join_all(resting)).await;
    assert_eq!(test.logged().await.len(), 21);
}

#[tokio::test]
async fn each_is_told_that_there_is_no_connection() {
    let test = Test::new().await;
    within("the pool is closed", test.client.pool().close()).await;
    let emits = (0..20).map(|n| Test::emit(test.client.clone(), n));
    for stored in within("all are answered", join_all(emits)).await {
        assert!(
            matches!(stored, Err(EmitError::Connect(sqlx::Error::PoolClosed))),
            "{stored:?}"
        );
    }
    assert_eq!(test.logged().await, []);
}
