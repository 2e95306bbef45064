//! Findings that need a smaller bound, or something broken by hand, on a real server. What apps do themselves is
//! tested by the program `nexus`.

use std::{env, fs, path::Path};

use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};

use super::*;
use crate::testing::TestDatabase;

/// A namespace `shop` with a group, in which nothing is wrong.
struct Shop {
    test: TestDatabase,
    pool: PgPool,
    database: Database,
}

impl Shop {
    async fn new() -> Self {
        let test = TestDatabase::new().await;
        let pool = test.pool().await;
        let database = Database::from_url(test.url(), "the test").unwrap();
        let shop = Self {
            test,
            pool,
            database,
        };
        shop.run("select core.ensure_group('shop', 'default')")
            .await;
        shop
    }

    async fn run(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }

    async fn diagnose(&self) -> Vec<Finding> {
        self.diagnose_by(BOUNDS).await
    }

    async fn diagnose_by(&self, bounds: Bounds) -> Vec<Finding> {
        let found = self.database.diagnose_by(bounds, "shop").await.unwrap();
        of_the_database(found)
    }

    /// What is found, if it is one thing.
    async fn finds(&self) -> Finding {
        only(&self.diagnose().await)
    }
}

/// Without what the server of the test kit is to blame for: it keeps nothing.
fn of_the_database(found: Vec<Finding>) -> Vec<Finding> {
    let of_the_kit = [
        "fsync-off",
        "full-page-writes-off",
        "synchronous-commit-off",
        "wal-level-minimal",
        "idle-in-transaction-unlimited",
        "slow-statements-unknown",
        "autovacuum-off",
        "connections-near-end",
    ];
    let is_setting = |finding: &Finding| {
        let subject = finding.subject.as_deref().unwrap_or_default();
        of_the_kit.contains(&finding.id) && !subject.starts_with("pgmq.")
    };
    found
        .into_iter()
        .filter(|finding| !is_setting(finding))
        .collect()
}

#[track_caller]
fn only(found: &[Finding]) -> Finding {
    let [finding] = found else {
        panic!("{found:#?}");
    };
    assert!(
        !finding.help.is_empty() && !finding.what.contains('\n'),
        "{finding:?}"
    );
    finding.clone()
}

fn ids(found: &[Finding]) -> Vec<(&str, Option<&str>)> {
    found
        .iter()
        .map(|finding| (finding.id, finding.subject.as_deref()))
        .collect()
}

/// `migrations/sql/objects.txt` is what a new database has. After a change of the schema: run this with
/// `NEXUS_OBJECTS=overwrite` and commit the file.
#[tokio::test]
async fn the_list_of_objects_is_that_of_a_new_database() {
    let test = TestDatabase::empty().await;
    let database = Database::from_url(test.url(), "the test").unwrap();
    database.migrate().await.unwrap();
    let mut connection = connect(database.options()).await.unwrap();
    let mut tx = diagnosis::begin(&mut connection).await.unwrap();
    let objects = nexus_migrations::objects(&mut tx).await.unwrap();
    if env::var_os("NEXUS_OBJECTS").is_some_and(|value| value == "overwrite") {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/sql/objects.txt");
        fs::write(file, objects).unwrap();
        return;
    }
    let listed = nexus_migrations::OBJECTS;
    let difference = |one: &str, other: &str| {
        let lines = one
            .lines()
            .filter(|line| !other.lines().any(|known| known == *line));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        (difference(&objects, listed), difference(listed, &objects)),
        (Vec::new(), Vec::new()),
        "what a new database has beside the file, and the file beside it: run with NEXUS_OBJECTS=overwrite"
    );
}

#[tokio::test]
async fn a_new_namespace_is_healthy() {
    let shop = Shop::new().await;
    assert_eq!(shop.diagnose().await, []);
}

#[tokio::test]
async fn a_check_cannot_write() {
    let shop = Shop::new().await;
    let mut connection = connect(shop.database.options()).await.unwrap();
    let mut tx = diagnosis::begin(&mut connection).await.unwrap();
    let refused = sqlx::raw_sql("delete from core.groups")
        .execute(&mut *tx)
        .await;
    assert!(store::is_read_only(&refused.unwrap_err()));
}

#[tokio::test]
async fn what_was_dropped_or_changed_by_hand_is_named() {
    let shop = Shop::new().await;
    shop.run(
        "drop index core.event_log_emitted_at;
         drop table core.tokens cascade;
         drop function core.touch_node_heartbeat(text);
         alter table core.event_log disable trigger append_only;
         alter table core.nodes disable row level security;
         create or replace function core.owner() returns oid language sql stable
             set search_path = pg_catalog, pg_temp as 'select nspowner from pg_namespace where nspname = ''core''';",
    )
    .await;
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("object-missing", Some("table core.tokens")),
            (
                "object-missing",
                Some("index core.event_log.event_log_emitted_at")
            ),
            (
                "object-missing",
                Some("function core.touch_node_heartbeat(p_node_id text)")
            ),
            ("object-changed", Some("table core.nodes")),
            ("object-changed", Some("trigger core.event_log.append_only")),
            ("object-changed", Some("function core.owner()")),
        ]
    );
    assert!(found[0].help.contains("0020_tokens.up.sql"), "{found:#?}");
}

#[tokio::test]
async fn an_index_that_is_not_valid_is_named() {
    let shop = Shop::new().await;
    let definition = "select pg_get_indexdef('core.nodes_namespace'::regclass)";
    let definition: String = sqlx::query_scalar(definition)
        .fetch_one(&shop.pool)
        .await
        .unwrap();
    shop.run("drop index core.nodes_namespace").await;
    // A concurrent build that is given up leaves what it has.
    let mut other = shop.pool.begin().await.unwrap();
    let lock = sqlx::query("lock table core.nodes in row exclusive mode");
    lock.execute(&mut *other).await.unwrap();
    let mut builder = shop.pool.acquire().await.unwrap();
    let patience = sqlx::query("set lock_timeout = '10ms'");
    patience.execute(&mut *builder).await.unwrap();
    let concurrent = definition.replacen("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1);
    let attempt = sqlx::query(AssertSqlSafe(concurrent)).execute(&mut *builder);
    let given_up = attempt.await.unwrap_err().to_string();
    assert!(given_up.contains("lock timeout"), "{given_up}");
    builder.close().await.unwrap();
    other.rollback().await.unwrap();
    let finding = shop.finds().await;
    assert_eq!(finding.id, "object-changed");
    assert_eq!(finding.help, "reindex index core.nodes_namespace");
}

#[tokio::test]
async fn a_schema_of_another_version_is_said_to_be_one() {
    let shop = Shop::new().await;
    let find = async |sql: &'static str| {
        shop.run(sql).await;
        shop.finds().await.id
    };
    let newer = "insert into core.schema_migrations (version, name, checksum) values (9999, '9999_later', '')";
    assert_eq!(find(newer).await, "schema-newer");
    let older = "delete from core.schema_migrations where version > 19";
    assert_eq!(find(older).await, "schema-older");
    let edited = "update core.schema_migrations set checksum = 'x' where version = 3";
    assert_eq!(find(edited).await, "schema-edited");
    let none = "drop schema core cascade";
    assert_eq!(find(none).await, "schema-missing");
    let foreign = "create schema core";
    assert_eq!(find(foreign).await, "schema-foreign");
}

#[tokio::test]
async fn months_without_a_partition_are_found_before_they_come() {
    let shop = Shop::new().await;
    let now = shop.test.now().await;
    let month = async |ahead: i32| -> String {
        sqlx::query_scalar("select to_char(core.now() at time zone 'utc' + make_interval(months => $1), 'YYYY_MM')")
            .bind(ahead)
            .fetch_one(&shop.pool)
            .await
            .unwrap()
    };
    let drop = async |month: &str| {
        let drop = format!("drop table core.event_log_{month}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(drop))
            .execute(&shop.pool)
            .await
            .unwrap();
    };
    let next = month(1).await;
    drop(&next).await;
    let finding = shop.finds().await;
    assert_eq!(
        (finding.id, finding.severity),
        ("partitions-few", Severity::Warning)
    );
    assert_eq!(finding.subject.unwrap(), next.replace('_', "-"));
    drop(&month(0).await).await;
    let finding = shop.finds().await;
    assert_eq!(
        (finding.id, finding.severity),
        ("partition-missing", Severity::Error)
    );
    shop.run("select core.ensure_partitions()").await;
    assert_eq!(shop.diagnose().await, [], "at {now}");
}

#[tokio::test]
async fn whoever_keeps_the_server_from_cleaning_up_is_named() {
    let shop = Shop::new().await;
    let mut holder = shop.pool.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid() from pg_current_xact_id()")
        .fetch_one(&mut *holder)
        .await
        .unwrap();
    assert_eq!(shop.diagnose().await, [], "it has just begun");
    let bounds = Bounds {
        held_for: Duration::ZERO,
        ..BOUNDS
    };
    let finding = only(&shop.diagnose_by(bounds).await);
    assert_eq!(finding.id, "xmin-holder");
    assert_eq!(finding.help, format!("select pg_terminate_backend({pid})"));
    holder.rollback().await.unwrap();
    assert_eq!(shop.diagnose_by(bounds).await, []);
}

#[tokio::test]
async fn queues_that_are_gone_untuned_or_full_of_dead_rows_are_named() {
    let shop = Shop::new().await;
    shop.run("alter table pgmq.q_core_events_shop set (autovacuum_enabled = false)")
        .await;
    let finding = shop.finds().await;
    assert_eq!(finding.id, "autovacuum-off");
    assert!(
        finding
            .help
            .contains("alter table pgmq.q_core_events_shop reset")
    );

    shop.run("insert into pgmq.q_core_events_shop (vt, message) select now(), '{}' from generate_series(1, 100)")
        .await;
    shop.run("delete from pgmq.q_core_events_shop").await;
    let bounds = Bounds {
        dead_rows: 100,
        ..BOUNDS
    };
    // Its own session tells what it did a moment later, unless it is asked to.
    let session = PgPoolOptions::new()
        .max_connections(1)
        .connect(shop.test.url());
    let session = session.await.unwrap();
    sqlx::raw_sql(
        "insert into pgmq.q_core_events_shop (vt, message) select now(), '{}' from generate_series(1, 100);
         delete from pgmq.q_core_events_shop;",
    )
    .execute(&session)
    .await
    .unwrap();
    sqlx::raw_sql("select pg_stat_force_next_flush()")
        .execute(&session)
        .await
        .unwrap();
    let found = shop.diagnose_by(bounds).await;
    assert_eq!(
        ids(&found),
        [
            ("autovacuum-off", Some("pgmq.q_core_events_shop")),
            ("queue-bloat", Some("pgmq.q_core_events_shop")),
        ]
    );
    assert_eq!(
        ids(&shop.diagnose().await).len(),
        1,
        "a hundred are not many"
    );

    shop.run("drop index pgmq.q_core_events_shop_vt_idx").await;
    shop.run("alter table pgmq.q_core_events_shop reset (autovacuum_enabled)")
        .await;
    assert_eq!(
        ids(&shop.diagnose().await),
        [("queue-index-missing", Some("default"))]
    );
    shop.run("select core.tune_queue('core_events_shop', true)")
        .await;
    assert_eq!(shop.diagnose().await, []);
    shop.run("drop table pgmq.q_core_events_shop").await;
    let finding = shop.finds().await;
    assert_eq!(
        (finding.id, finding.severity),
        ("queue-missing", Severity::Error)
    );
    shop.run("select core.ensure_group('shop', 'default')")
        .await;
    assert_eq!(shop.diagnose().await, []);
}

#[tokio::test]
async fn clocks_that_disagree_are_found() {
    let shop = Shop::new().await;
    shop.test.advance(Duration::from_hours(1)).await;
    let finding = shop.finds().await;
    assert_eq!(finding.id, "clock-skew");
    assert!(
        finding.what.contains("ahead of this machine's"),
        "{finding:?}"
    );

    let shop = Shop::new().await;
    shop.run(
        "insert into core.nodes (node_id, namespace, app, last_heartbeat)
         values ('ada', 'shop', 'billing', core.now() + interval '1 hour')",
    )
    .await;
    let finding = shop.finds().await;
    assert_eq!(
        (finding.id, finding.subject.as_deref()),
        ("clock-skew", Some("ada"))
    );
    assert!(finding.what.contains("has gone back"), "{finding:?}");
}

#[tokio::test]
async fn a_failing_check_is_a_finding_and_the_others_go_on() {
    let shop = Shop::new().await;
    shop.run("select core.ensure_group('shop', 'slow')").await;
    shop.run("insert into pgmq.q_core_events_shop__slow_dlq (vt, message) values (now(), '{}')")
        .await;
    shop.run(
        "insert into core.nodes (node_id, namespace, app, last_heartbeat)
         values ('gone', 'shop', 'billing', core.now() - interval '1 hour'),
                ('gone-before', 'shop', 'billing', core.now() - interval '2 hours')",
    )
    .await;
    let mut holder = shop.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table pgmq.q_core_events_shop_dlq in access exclusive mode")
        .execute(&mut *holder)
        .await
        .unwrap();
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("not-checked", Some("groups")),
            ("node-dead", Some("billing"))
        ]
    );
    holder.rollback().await.unwrap();
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("dead-letters", Some("slow")),
            ("node-dead", Some("billing"))
        ]
    );
}

#[tokio::test]
async fn what_cannot_run_is_told_from_what_is_paused() {
    let shop = Shop::new().await;
    shop.run(
        "insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, payload, active, last_error)
         values ('shop', 'broken', '* * * * *', 'x', '{}', false, 'no such time zone'),
                ('shop', 'sleeping', '* * * * *', 'x', '{}', true, null);
         update core.scheduled_tasks set paused_at = core.now() where name = 'sleeping'",
    )
    .await;
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("schedule-inactive", Some("broken")),
            ("schedule-paused", Some("sleeping"))
        ]
    );
    assert!(found[0].what.contains("no such time zone"));
}

#[tokio::test]
async fn too_many_sessions_are_found() {
    let shop = Shop::new().await;
    let bounds = Bounds {
        sessions_percent: 0,
        ..BOUNDS
    };
    let found = shop.database.diagnose_by(bounds, "shop").await.unwrap();
    assert!(
        ids(&found).contains(&("connections-near-end", Some("max_connections"))),
        "{found:#?}"
    );
    let bounds = Bounds {
        sessions_percent: 101,
        ..BOUNDS
    };
    let found = shop.database.diagnose_by(bounds, "shop").await.unwrap();
    assert!(
        !ids(&found)
            .iter()
            .any(|(id, _)| *id == "connections-near-end"),
        "{found:#?}"
    );
}

#[tokio::test]
async fn a_namespace_that_is_not_there_is_told_from_one_that_is() {
    let shop = Shop::new().await;
    let found = shop.database.diagnose("mall").await.unwrap();
    let finding = only(&of_the_database(found));
    assert_eq!(finding.id, "namespace-unknown");
    assert!(finding.what.contains("it has shop"), "{finding:?}");
}

#[tokio::test]
async fn a_database_that_takes_no_writes_is_diagnosed() {
    let shop = Shop::new().await;
    let name: String = sqlx::query_scalar("select quote_ident(current_database())")
        .fetch_one(&shop.pool)
        .await
        .unwrap();
    let alter = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::raw_sql(sqlx::AssertSqlSafe(alter))
        .execute(&shop.pool)
        .await
        .unwrap();
    assert_eq!(shop.finds().await.id, "read-only");
}

#[tokio::test]
async fn handlers_and_versions_that_nobody_runs_are_named() {
    let shop = Shop::new().await;
    let handlers = r#"[{"group": "default", "handler": "book", "eventType": "order.paid", "eventVersion": 2},
                       {"group": "default", "handler": "gone", "eventType": "order.paid", "eventVersion": 2}]"#;
    sqlx::query("select core.subscribe('shop', 'default', $1::jsonb)")
        .bind(handlers)
        .execute(&shop.pool)
        .await
        .unwrap();
    shop.run(
        r#"insert into core.nodes (node_id, namespace, app, last_heartbeat, handlers)
           values ('ada', 'shop', 'default', core.now() + interval '4 seconds',
                   '[{"group": "default", "handler": "book", "eventType": "order.paid", "eventVersion": 2}]');
           select core.emit('shop', 'order.paid', '{}', '{"version": 2}');
           insert into pgmq.q_core_events_shop (vt, message, headers)
           values (now(), '{}', '{"handler": "book", "eventVersion": "1"}')"#,
    )
    .await;
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("version-not-live", Some("default/book")),
            ("handler-not-live", Some("default/gone")),
        ]
    );
    assert!(found[0].what.contains("1 message for it"), "{found:#?}");
    assert!(found[1].what.contains("1 message for it"), "{found:#?}");
    shop.run("update core.nodes set last_heartbeat = core.now() - interval '20 seconds'")
        .await;
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("node-dead", Some("default")),
            ("handler-not-live", Some("default/book")),
            ("handler-not-live", Some("default/gone")),
        ]
    );
}

#[tokio::test]
async fn events_that_nobody_handles_are_named_by_type() {
    let shop = Shop::new().await;
    shop.run(
        "select core.emit('shop', t, '{}') from unnest(array['b.lost', 'a.lost', 'b.lost']) t;
         select core.ensure_group('mall', 'default');
         select core.emit('mall', 'c.lost', '{}');",
    )
    .await;
    let found = shop.diagnose().await;
    assert_eq!(
        ids(&found),
        [
            ("event-unhandled", Some("a.lost")),
            ("event-unhandled", Some("b.lost"))
        ]
    );
    assert!(
        found
            .iter()
            .all(|finding| finding.severity == Severity::Note)
    );
}

/// What a role finds out about the shop.
struct Role<'a> {
    shop: &'a Shop,
    name: String,
}

impl<'a> Role<'a> {
    async fn new(shop: &'a Shop, suffix: &str) -> Self {
        let database: String = sqlx::query_scalar("select current_database()::text")
            .fetch_one(&shop.pool)
            .await
            .unwrap();
        // Whoever sweeps roles that were left behind knows them by the database's name.
        let name = format!("{database}_{suffix}");
        let role = Self { shop, name };
        role.run("create role {role} login password 's3cret'").await;
        role
    }

    async fn run(&self, sql: &str) {
        let sql = sqlx::AssertSqlSafe(sql.replace("{role}", &self.name));
        sqlx::raw_sql(sql).execute(&self.shop.pool).await.unwrap();
    }

    async fn diagnose(&self) -> Vec<Finding> {
        let (scheme, rest) = self.shop.test.url().split_once("://").unwrap();
        let (_, host) = rest.rsplit_once('@').unwrap();
        let url = format!("{scheme}://{}:s3cret@{host}", self.name);
        let database = Database::from_url(&url, "the test").unwrap();
        of_the_database(database.diagnose("shop").await.unwrap())
    }

    async fn end(self) {
        self.run("select core.revoke_namespace('shop', '{role}'); drop role {role}")
            .await;
    }
}

#[tokio::test]
async fn a_role_with_few_rights_finds_out_what_it_may() {
    let shop = Shop::new().await;
    let role = Role::new(&shop, "ada").await;
    let found = role.diagnose().await;
    assert_eq!(ids(&found), [("schema-denied", None)], "{found:#?}");
    let bind = format!("select core.grant_namespace('shop', '{}')", role.name);
    assert!(found[0].help.ends_with(&bind), "{found:#?}");

    role.run("select core.grant_namespace('shop', '{role}', 'read')")
        .await;
    let found = role.diagnose().await;
    assert_eq!(
        ids(&found),
        [("role-looks-only", Some(&*role.name))],
        "{found:#?}"
    );
    assert_eq!(found[0].severity, Severity::Note);

    role.run("select core.grant_namespace('shop', '{role}')")
        .await;
    assert_eq!(role.diagnose().await, []);
    role.run("select core.ensure_group('mall', 'default')")
        .await;
    assert_eq!(
        role.diagnose().await,
        [],
        "what it may not see is none of its business"
    );

    role.run("revoke delete on pgmq.q_core_events_shop from {role}; revoke insert on core.event_log from {role}")
        .await;
    role.run("revoke all on core.nodes from {role}").await;
    let found = role.diagnose().await;
    let seen = ids(&found);
    assert!(
        seen.contains(&("rights-missing", Some(&*role.name))),
        "{found:#?}"
    );
    assert!(
        seen.contains(&("rights-missing", Some("pgmq.q_core_events_shop"))),
        "{found:#?}"
    );
    assert!(seen.contains(&("not-checked", Some("nodes"))), "{found:#?}");
    assert!(found[0].help.ends_with(&bind), "{found:#?}");
    role.end().await;
}

#[tokio::test]
async fn a_connection_that_is_lost_ends_the_look() {
    let shop = Shop::new().await;
    let mut holder = shop.pool.begin().await.unwrap();
    sqlx::raw_sql(
        "lock table core.groups, core.nodes, core.subscriptions in access exclusive mode",
    )
    .execute(&mut *holder)
    .await
    .unwrap();
    let end = async {
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
                   where datname = current_database() and wait_event_type = 'Lock'";
        let asked = async || sqlx::query(end).fetch_optional(&shop.pool).await.unwrap();
        while asked().await.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::future::pending::<()>().await;
    };
    let looked = tokio::select! {
        looked = shop.database.diagnose("shop") => looked,
        () = end => unreachable!(),
    };
    let error = looked.unwrap_err();
    assert!(matches!(error, ConnectError::Unusable { .. }), "{error}");
}

#[tokio::test]
async fn a_migration_under_way_is_not_waited_for() {
    let shop = Shop::new().await;
    let mut holder = shop.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table core.schema_migrations in access exclusive mode")
        .execute(&mut *holder)
        .await
        .unwrap();
    let finding = shop.finds().await;
    assert_eq!(finding.id, "not-checked");
    assert_eq!(
        finding.subject.as_deref(),
        Some("the version of the schema")
    );
}

#[test]
fn a_look_may_be_a_task_of_its_own() {
    fn is_send(_: impl Send) {}
    let database = Database::from_url("postgres://db/shop", "the test").unwrap();
    is_send(database.diagnose("shop"));
}
