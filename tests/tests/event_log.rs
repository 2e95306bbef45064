//! The event log is append-only, for everybody, and its partitions come and go on time while emits
//! go on: created twelve months ahead, dropped when the retention has passed, restored by the first
//! emit after a long outage.

use std::time::{Duration, Instant};

use nexus::{Database, EmitError, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, SqlSafeStr, postgres::PgPoolOptions};
use tokio_util::sync::CancellationToken;

/// A minute has passed.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "minute.passed")]
struct MinutePassed {
    n: u32,
}

const DAY: Duration = Duration::from_hours(24);

async fn client(database: &TestDatabase) -> nexus::Client {
    let database = Database::from_url(database.url(), "the test").unwrap();
    nexus::Client::connect(&database, "demo").await.unwrap()
}

/// An app whose caretaker looks after the log as soon as it starts.
async fn caretaker(database: &TestDatabase) -> nexus::Handle {
    nexus::start(App::discover().database_url(database.url()))
        .await
        .unwrap()
}

async fn texts(pool: &PgPool, query: &str) -> Vec<String> {
    let text = AssertSqlSafe(query.to_owned()).into_sql_str();
    sqlx::query_scalar(text).fetch_all(pool).await.unwrap()
}

async fn partitions(pool: &PgPool) -> Vec<String> {
    texts(
        pool,
        "select inhrelid::regclass::text from pg_inherits
         where inhparent = 'core.event_log'::regclass and not inhdetachpending order by 1",
    )
    .await
}

/// The partitions of the months from the clock's on.
async fn months(pool: &PgPool, from: i32, to: i32) -> Vec<String> {
    texts(
        pool,
        &format!(
            "select 'core.event_log_' || to_char(core.now() at time zone 'UTC' + make_interval(months => m), 'YYYY_MM')
             from generate_series({from}, {to}) m order by 1"
        ),
    )
    .await
}

async fn execute(pool: &PgPool, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()).into_sql_str())
        .execute(pool)
        .await
        .unwrap();
}

#[tokio::test]
async fn it_is_append_only_for_everybody() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    client(&database)
        .await
        .emit(&MinutePassed { n: 1 })
        .await
        .unwrap();
    // Sessions of replication run no ordinary triggers; only a superuser may open one.
    let mut sessions = texts(
        &pool,
        "select 'set session_replication_role = replica;' from pg_roles
         where rolname = current_user and rolsuper",
    )
    .await;
    sessions.push(String::new());
    let partition = months(&pool, 0, 0).await.remove(0);
    for settings in &sessions {
        for table in ["core.event_log", &partition] {
            for statement in [
                "update TABLE set payload = '{}'",
                "update TABLE set event_id = event_id where false",
                "delete from TABLE",
                "delete from only TABLE",
                "truncate TABLE",
                "truncate TABLE cascade",
                "merge into TABLE t using (select 1) s on true when matched then delete",
                "merge into TABLE t using (select 1) s on true when matched then update set payload = '{}'",
                "insert into TABLE select * from core.event_log on conflict (event_id, emitted_at) do update set payload = '{}'",
                "with d as (delete from TABLE returning 1) select count(*) from d",
            ] {
                let statement = statement.replace("TABLE", table);
                let text = AssertSqlSafe(format!("{settings} {statement}")).into_sql_str();
                let mut tx = pool.begin().await.unwrap();
                let error = sqlx::raw_sql(text)
                    .execute(&mut *tx)
                    .await
                    .expect_err(&statement);
                let error = error.as_database_error().unwrap();
                assert_eq!(
                    error.code().as_deref(),
                    Some("23001"),
                    "{statement}: {error}"
                );
                assert!(
                    error.message().contains("append-only"),
                    "{statement}: {error}"
                );
                tx.rollback().await.unwrap();
            }
        }
    }
    assert_eq!(
        texts(&pool, "select payload::text from core.event_log").await,
        ["{\"n\": 1}"]
    );
}

#[tokio::test]
async fn partitions_are_twelve_months_ahead() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    assert_eq!(partitions(&pool).await, months(&pool, 0, 12).await);
    // Nodes that look after it at the same time create each once, and all of them succeed.
    database.advance(93 * DAY).await;
    let mut nodes = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        nodes.spawn(async move { execute(&pool, "select core.maintain('demo')").await });
    }
    within("all maintain", nodes.join_all()).await;
    let ahead = months(&pool, 0, 12).await;
    assert!(ahead.iter().all(|month| !month.is_empty()));
    let found = partitions(&pool).await;
    assert!(
        ahead.iter().all(|month| found.contains(month)),
        "{ahead:?} in {found:?}"
    );
    // Every one refuses changes by itself and has its indexes.
    for partition in &found {
        let text = AssertSqlSafe(format!("delete from {partition}")).into_sql_str();
        sqlx::raw_sql(text)
            .execute(&pool)
            .await
            .expect_err(partition);
    }
    let indexes = texts(
        &pool,
        "select count(*)::text from pg_indexes where schemaname = 'core'
                                and tablename ~ '^event_log' group by tablename",
    )
    .await;
    assert_eq!(indexes, vec!["3"; found.len() + 1]);
}

#[tokio::test]
async fn months_begin_at_midnight_utc_whatever_the_session_says() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let mut connection = pool.acquire().await.unwrap();
    sqlx::raw_sql("set timezone = 'Pacific/Auckland'; set datestyle = 'SQL, DMY'; select core.ensure_partitions(30)")
        .execute(&mut *connection)
        .await
        .unwrap();
    let wrong = "with edges as (
             insert into core.event_log (namespace, event_type, payload, producer_node_id, emitted_at)
             select 'demo', 'edge', '{}', 'n', at
             from generate_series(date_trunc('month', now() at time zone 'UTC') at time zone 'UTC' + interval '1 month',
                                  now() + interval '29 months', interval '1 month') edge,
                  unnest(array[edge, edge - interval '1 microsecond', edge + interval '1 microsecond']) at
             returning tableoid::regclass::text as placed, emitted_at
         )
         select placed from edges
         where placed <> 'core.event_log_' || to_char(emitted_at at time zone 'UTC', 'YYYY_MM')";
    // The months are counted in UTC here as well.
    sqlx::raw_sql("set timezone = 'UTC'")
        .execute(&mut *connection)
        .await
        .unwrap();
    let wrong: Vec<String> = sqlx::query_scalar(wrong)
        .fetch_all(&mut *connection)
        .await
        .unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert_eq!(partitions(&pool).await, months(&pool, 0, 30).await);
}

/// Emits all the time on connections that give up what has to wait for a lock; returns how often.
async fn emit_until(stop: CancellationToken, url: String) -> u32 {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .after_connect(|connection, _| {
            Box::pin(async move {
                sqlx::raw_sql("set lock_timeout = '2s'; set statement_timeout = '5s'")
                    .execute(connection)
                    .await
                    .map(drop)
            })
        })
        .connect(&url)
        .await
        .unwrap();
    let mut emitted = 0;
    while !stop.is_cancelled() {
        let began = Instant::now();
        execute(
            &pool,
            "select core.emit('demo', 'minute.passed', '{\"n\": 0}')",
        )
        .await;
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "an emit took {:?}",
            began.elapsed()
        );
        emitted += 1;
    }
    emitted
}

#[tokio::test]
async fn expired_partitions_are_dropped_while_emits_go_on() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let client = client(&database).await;
    let old = client.emit(&MinutePassed { n: 1 }).await.unwrap();
    let all = partitions(&pool).await;
    let stop = CancellationToken::new();
    let mut emitters = tokio::task::JoinSet::new();
    for _ in 0..3 {
        emitters.spawn(emit_until(stop.clone(), database.url().to_owned()));
    }
    // With 183 days of retention, the month of the event is kept for now.
    database.advance(150 * DAY).await;
    let app = caretaker(&database).await;
    until("the months ahead are there", || async {
        partitions(&pool)
            .await
            .contains(&months(&pool, 12, 12).await[0])
            .then_some(())
    })
    .await;
    app.shutdown().await;
    assert!(partitions(&pool).await.starts_with(&all));
    assert_eq!(
        texts(
            &pool,
            &format!("select '' from core.event_log where event_id = {old}")
        )
        .await
        .len(),
        1
    );

    database.advance(95 * DAY).await;
    let kept = texts(
        &pool,
        "select 'core.event_log_' || to_char(core.now() at time zone 'UTC' - interval '183 days', 'YYYY_MM')",
    )
    .await;
    let app = caretaker(&database).await;
    until("the expired months are gone", || async {
        (partitions(&pool).await.first() == kept.first()).then_some(())
    })
    .await;
    app.shutdown().await;
    stop.cancel();
    let emitted: u32 = emitters.join_all().await.iter().sum();
    assert!(emitted > 20, "{emitted} emits is not all the time");
    assert!(
        texts(
            &pool,
            &format!("select '' from core.event_log where event_id = {old}")
        )
        .await
        .is_empty()
    );
    assert_eq!(
        texts(
            &pool,
            "select relname::text from pg_class where relnamespace = 'core'::regnamespace
                      and relkind = 'r' and relname ~ '^event_log_' order by 1"
        )
        .await
        .len(),
        partitions(&pool).await.len(),
        "what is detached is dropped"
    );
}

#[tokio::test]
async fn the_retention_can_be_chosen() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    database.advance(70 * DAY).await;
    let app = App::discover()
        .database_url(database.url())
        .log_retention(7 * DAY);
    let app = nexus::start(app).await.unwrap();
    let kept = texts(
        &pool,
        "select 'core.event_log_' || to_char(core.now() at time zone 'UTC' - interval '7 days', 'YYYY_MM')",
    )
    .await;
    until("the expired months are gone", || async {
        (partitions(&pool).await.first() == kept.first()).then_some(())
    })
    .await;
    app.shutdown().await;
}

/// An emit that is open, on its connection.
async fn open_emit(pool: &PgPool) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut tx = pool.begin().await.unwrap();
    let connection: &mut PgConnection = &mut tx;
    sqlx::raw_sql("select core.emit('demo', 'minute.passed', '{\"n\": 0}')")
        .execute(connection)
        .await
        .unwrap();
    tx
}

#[tokio::test]
async fn an_open_emit_does_not_make_others_wait_for_new_partitions() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    client(&database).await;
    let open = open_emit(&pool).await;
    let stop = CancellationToken::new();
    let emitter = tokio::spawn(emit_until(stop.clone(), database.url().to_owned()));
    database.advance(93 * DAY).await;
    // Neither does the transaction that attaches them, for as long as it takes.
    let mut attaching = pool.begin().await.unwrap();
    let created: i32 = sqlx::query_scalar("select core.ensure_partitions()")
        .fetch_one(&mut *attaching)
        .await
        .unwrap();
    assert!(created > 0);
    for _ in 0..20 {
        within("an emit passes", open_emit(&pool))
            .await
            .commit()
            .await
            .unwrap();
    }
    attaching.commit().await.unwrap();
    stop.cancel();
    assert!(emitter.await.unwrap() > 0);
    open.commit().await.unwrap();
}

#[tokio::test]
async fn a_detach_that_an_open_emit_holds_up_disturbs_nobody_and_is_finished_later() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let client = client(&database).await;
    let first = partitions(&pool).await.remove(0);
    let open = open_emit(&pool).await;
    database.advance(250 * DAY).await;
    let stop = CancellationToken::new();
    let emitter = tokio::spawn(emit_until(stop.clone(), database.url().to_owned()));
    let app = caretaker(&database).await;
    until("the detach is on its way", || async {
        let pending = texts(
            &pool,
            "select inhrelid::regclass::text from pg_inherits where inhdetachpending",
        )
        .await;
        (pending == [first.as_str()]).then_some(())
    })
    .await;
    client.emit(&MinutePassed { n: 1 }).await.unwrap();
    // The caretaker gives up by itself, or this would hang.
    within("the app stops", app.shutdown()).await;
    assert_eq!(
        texts(
            &pool,
            "select inhrelid::regclass::text from pg_inherits where inhdetachpending"
        )
        .await,
        [first.as_str()]
    );
    open.commit().await.unwrap();
    let app = caretaker(&database).await;
    until(
        "the detach is finished and all that is expired dropped",
        || async {
            let left = texts(
                &pool,
                "select name from core.expired_partitions('183 days')",
            )
            .await;
            left.is_empty().then_some(())
        },
    )
    .await;
    app.shutdown().await;
    stop.cancel();
    assert!(emitter.await.unwrap() > 0);
    assert!(
        texts(
            &pool,
            &format!(
                "select to_regclass('{first}')::text where to_regclass('{first}') is not null"
            )
        )
        .await
        .is_empty()
    );
}

#[tokio::test]
async fn what_was_detached_and_not_dropped_is_dropped_unless_by_hand() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let all = partitions(&pool).await;
    // A node that died between the two steps, and somebody who archives a month on purpose.
    execute(
        &pool,
        &format!(
            "comment on table {0} is 'expired'; alter table core.event_log detach partition {0};
             alter table core.event_log detach partition {1}",
            all[0], all[1]
        ),
    )
    .await;
    database.advance(250 * DAY).await;
    let app = caretaker(&database).await;
    until("the expired ones are gone", || async {
        let left = texts(
            &pool,
            "select name from core.expired_partitions('183 days')",
        )
        .await;
        left.is_empty().then_some(())
    })
    .await;
    app.shutdown().await;
    let left = texts(&pool, "select oid::regclass::text from pg_class where relkind = 'r' and relname ~ '^event_log_' order by 1").await;
    assert!(!left.contains(&all[0]), "{left:?}");
    assert_eq!(
        left[0], all[1],
        "what was detached by hand belongs to who did it"
    );
}

#[tokio::test]
async fn the_first_emit_after_a_long_outage_creates_what_is_missing() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let client = client(&database).await;
    database.advance(430 * DAY).await;
    // In a transaction of the caller's it cannot be mended, but it says what is wrong.
    let mut tx = pool.begin().await.unwrap();
    let error = client
        .emit_in(&mut tx, &MinutePassed { n: 1 })
        .await
        .unwrap_err();
    assert!(
        matches!(error, EmitError::MissingPartition { .. }),
        "{error}"
    );
    tx.rollback().await.unwrap();

    let id = client.emit(&MinutePassed { n: 2 }).await.unwrap();
    let placed = texts(
        &pool,
        &format!("select tableoid::regclass::text from core.event_log where event_id = {id}"),
    )
    .await;
    assert_eq!(placed, months(&pool, 0, 0).await);
    let found = partitions(&pool).await;
    for month in months(&pool, 0, 12).await {
        assert!(found.contains(&month), "{month} in {found:?}");
    }
    open_emit(&pool).await.commit().await.unwrap();
}

#[tokio::test]
async fn ids_go_on_across_partitions() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let client = client(&database).await;
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(client.emit(&MinutePassed { n }).await.unwrap());
        database.advance(31 * DAY).await;
    }
    let sorted: Vec<i64> =
        sqlx::query_scalar("select event_id from core.event_log order by emitted_at")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(ids, sorted);
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{ids:?}");
    let placed = texts(
        &pool,
        "select distinct tableoid::regclass::text from core.event_log",
    )
    .await;
    assert_eq!(placed.len(), 6);
}

#[tokio::test]
async fn append_event_log_appends_and_tells_nobody() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    client(&database).await;
    execute(
        &pool,
        "select core.subscribe('demo', 'default', '[{\"group\": \"default\", \"handler\": \"h\", \"eventType\": \"user.created\"}]');
         select core.append_event_log('demo', 'user.created', '{\"userId\": \"123\"}', 'node-1');
         select core.append_event_log('demo', 'user.created', 'null', 'node-1', null, null);
         select core.append_event_log('demo', 'user.created', '[]', 'node-1', gen_random_uuid(), '{\"messageId\": 1}')",
    )
    .await;
    let logged = texts(
        &pool,
        "select format('%s %s %s', payload, metadata, scheduled_task_id is null)
                               from core.event_log order by event_id",
    )
    .await;
    assert_eq!(
        logged,
        [
            "{\"userId\": \"123\"} {} t",
            "null {} t",
            "[] {\"messageId\": 1} f"
        ]
    );
    assert!(
        texts(&pool, "select message::text from pgmq.q_core_events_demo")
            .await
            .is_empty()
    );
}
