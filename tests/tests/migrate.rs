//! The schema comes, goes and comes back the same; it says who may not bring it and what is in its
//! way, and leaves everything else in the database alone.

use std::str::FromStr;

use nexus::{Database, StartError, prelude::*, testing::TestDatabase};
use nexus_migrations::{MIGRATIONS, MigrateError, down, newest_version, up, verify};
use nexus_tests::within;
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, SqlSafeStr, migrate::Migrator,
    postgres::PgConnectOptions,
};

/// A thing happened.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "thing.happened")]
struct ThingHappened {}

fn options(database: &TestDatabase) -> PgConnectOptions {
    PgConnectOptions::from_str(database.url()).unwrap()
}

/// Connects as a role that may do nothing in particular, and exists on every server.
fn powerless(database: &TestDatabase) -> PgConnectOptions {
    options(database).options([("role", "pg_signal_backend")])
}

async fn execute(pool: &PgPool, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()).into_sql_str())
        .execute(pool)
        .await
        .unwrap();
}

/// All that the catalog knows of the schemas that match, a line each.
async fn catalog(database: &TestDatabase, schemas: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql("set search_path = pg_catalog; set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'")
        .execute(&mut connection)
        .await
        .unwrap();
    let lines = sqlx::query_scalar(
        "with schemas as (select oid, nspname, nspacl from pg_namespace where nspname ~ $1),
              relations as (select c.* from pg_class c join schemas s on s.oid = c.relnamespace)
         select format('schema %s %s %s', nspname, nspacl, obj_description(oid, 'pg_namespace')) from schemas
         union all
         select format('relation %s %s %s %s %s %s', oid::regclass, relkind, relacl, reloptions,
                       pg_get_expr(relpartbound, oid), obj_description(oid, 'pg_class')) from relations
         union all
         select format('column %s.%s %s %s %s %s %s', c.oid::regclass, a.attname, format_type(a.atttypid, a.atttypmod),
                       a.attnotnull, a.attidentity, a.attcompression, pg_get_expr(d.adbin, d.adrelid))
         from relations c
         join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
         union all
         select format('index %s', pg_get_indexdef(oid)) from relations where relkind in ('i', 'I')
         union all
         select format('view %s %s', oid::regclass, pg_get_viewdef(oid)) from relations where relkind = 'v'
         union all
         select format('constraint %s %s %s', n.conrelid::regclass, n.conname, pg_get_constraintdef(n.oid))
         from pg_constraint n join schemas s on s.oid = n.connamespace
         union all
         select format('trigger %s %s %s', t.tgrelid::regclass, t.tgenabled, pg_get_triggerdef(t.oid))
         from pg_trigger t join relations c on c.oid = t.tgrelid where not t.tgisinternal
         union all
         select format('function %s %s %s', pg_get_functiondef(p.oid), p.proacl, obj_description(p.oid, 'pg_proc'))
         from pg_proc p join schemas s on s.oid = p.pronamespace where p.prokind in ('f', 'p')
         union all
         select format('type %s', t.oid::regtype) from pg_type t join schemas s on s.oid = t.typnamespace
         union all
         select format('rows of %s are secured %s %s', c.oid::regclass, c.relrowsecurity, c.relforcerowsecurity)
         from relations c where c.relkind in ('r', 'p')
         union all
         select format('policy %s on %s %s %s %s %s', p.polname, c.oid::regclass, p.polcmd, p.polroles,
                       pg_get_expr(p.polqual, c.oid), pg_get_expr(p.polwithcheck, c.oid))
         from pg_policy p join relations c on c.oid = p.polrelid
         order by 1",
    )
    .bind(schemas)
    .fetch_all(&mut connection)
    .await
    .unwrap();
    connection.close().await.unwrap();
    lines
}

/// Everything but the system and schema `core`.
const OTHERS: &str = "^(?!core$|pg_|information_schema$)";

#[track_caller]
fn assert_same(found: &[String], expected: &[String]) {
    let more: Vec<_> = found
        .iter()
        .filter(|line| !expected.contains(line))
        .collect();
    let less: Vec<_> = expected
        .iter()
        .filter(|line| !found.contains(line))
        .collect();
    assert!(
        more.is_empty() && less.is_empty(),
        "too much: {more:#?}\nmissing: {less:#?}"
    );
}

#[tokio::test]
async fn up_down_and_up_again_make_the_same_schema() {
    let database = TestDatabase::empty().await;
    assert_eq!(up(&options(&database)).await.unwrap(), MIGRATIONS.len());
    let first = catalog(&database, "^core$").await;
    let others = catalog(&database, OTHERS).await;
    assert!(first.len() > 300, "{} lines", first.len());
    assert_eq!(
        down(&options(&database), 0).await.unwrap(),
        MIGRATIONS.len()
    );
    assert!(catalog(&database, "^core$").await.is_empty());
    assert_same(&catalog(&database, OTHERS).await, &others);
    assert_eq!(
        down(&options(&database), 0).await.unwrap(),
        0,
        "there is nothing left to take back"
    );
    assert_eq!(up(&options(&database)).await.unwrap(), MIGRATIONS.len());
    assert_same(&catalog(&database, "^core$").await, &first);
}

#[tokio::test]
async fn every_step_is_taken_back_by_its_own_file() {
    let (database, by_hand) = (TestDatabase::empty().await, TestDatabase::empty().await);
    up(&options(&database)).await.unwrap();
    let newest = catalog(&database, "^core$").await;
    let pool = by_hand.pool().await;
    pgmq::install::install_sql_from_embedded(&pool)
        .await
        .unwrap();
    let mut steps = vec![catalog(&by_hand, "^core$").await];
    let mut connection = pool.acquire().await.unwrap();
    for step in &MIGRATIONS[..MIGRATIONS.len() - 1] {
        sqlx::raw_sql(step.up)
            .execute(&mut *connection)
            .await
            .unwrap();
        steps.push(catalog(&by_hand, "^core$").await);
    }
    for (version, expected) in (0..newest_version()).zip(&steps).rev() {
        assert_eq!(down(&options(&database), version).await.unwrap(), 1);
        assert_same(&catalog(&database, "^core$").await, expected);
    }
    // From half-way on as well.
    up(&options(&database)).await.unwrap();
    assert_eq!(
        down(&options(&database), 3).await.unwrap(),
        MIGRATIONS.len() - 3
    );
    assert_eq!(up(&options(&database)).await.unwrap(), MIGRATIONS.len() - 3);
    assert_same(&catalog(&database, "^core$").await, &newest);
}

#[tokio::test]
async fn a_paused_task_is_no_removed_one_after_going_down_and_up() {
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    up(&options(&database)).await.unwrap();
    execute(
        &pool,
        "select core.ensure_group('demo', 'default');
         insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, app, next_run_at, paused_at)
         values ('demo', 'paused', '@daily', 'a.b', 'shop', core.now(), core.now())",
    )
    .await;
    down(&options(&database), 7).await.unwrap();
    up(&options(&database)).await.unwrap();
    // Only what was removed is made active again by a deployment.
    let (is_active, is_removed): (bool, bool) =
        sqlx::query_as("select active, removed_at is not null from core.scheduled_tasks")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!((is_active, is_removed), (false, false));
}

#[tokio::test]
async fn down_takes_its_queues_along_and_nothing_else() {
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    pgmq::install::install_sql_from_embedded(&pool)
        .await
        .unwrap();
    execute(
        &pool,
        "create table public.users (id int); create schema shop; create table shop.orders (id int);
         select pgmq.create('mails'); select pgmq.send('mails', '{}');
         select pgmq.create('core_events_not_ours')",
    )
    .await;
    let before = catalog(&database, OTHERS).await;
    up(&options(&database)).await.unwrap();
    execute(
        &pool,
        "select core.ensure_group('demo', 'default'), core.ensure_group('demo', 'billing'), core.ensure_group('my-app', 'x');
         select core.emit('demo', 'a.b', '{}'); select pgmq.send('core_events_demo', '{}');
         select pgmq.drop_queue('core_events_demo__billing'); drop table pgmq.q_core_events_my_app__x_dlq",
    )
    .await;
    assert_eq!(
        down(&options(&database), 0).await.unwrap(),
        MIGRATIONS.len()
    );
    assert_same(&catalog(&database, OTHERS).await, &before);
    let queues: Vec<String> = sqlx::query_scalar("select queue_name from pgmq.meta order by 1")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert_eq!(queues, ["core_events_not_ours", "mails"]);
    let mails: i64 = sqlx::query_scalar("select count(*) from pgmq.q_mails")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(mails, 1);
}

#[tokio::test]
async fn up_does_nothing_and_needs_nothing_when_it_is_there() {
    let database = TestDatabase::empty().await;
    up(&options(&database)).await.unwrap();
    let before = catalog(&database, "").await;
    assert_eq!(up(&options(&database)).await.unwrap(), 0);
    assert_same(&catalog(&database, "").await, &before);

    // A role that may not even look is told what it needs, and that is all it needs.
    let mut connection = PgConnection::connect_with(&powerless(&database))
        .await
        .unwrap();
    for error in [
        verify(&mut connection).await.unwrap_err(),
        up(&powerless(&database)).await.unwrap_err(),
    ] {
        let MigrateError::NotAllowed { role, grant, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(role, "pg_signal_backend");
        assert!(
            error
                .to_string()
                .contains("permission denied for schema core"),
            "{error}"
        );
        let pool = database.pool().await;
        execute(&pool, &grant.replace("<namespace>", "demo")).await;
        verify(&mut connection).await.unwrap();
        execute(
            &pool,
            &format!("select core.revoke_namespace('demo', '{role}')"),
        )
        .await;
    }
    execute(
        &database.pool().await,
        "select core.grant_namespace('demo', 'pg_signal_backend', 'read')",
    )
    .await;
    verify(&mut connection).await.unwrap();
    assert_eq!(up(&powerless(&database)).await.unwrap(), 0);
    let error = down(&powerless(&database), 0).await.unwrap_err();
    assert!(matches!(error, MigrateError::NotAllowed { .. }), "{error}");
}

#[tokio::test]
async fn a_role_without_rights_is_told_so() {
    let database = TestDatabase::empty().await;
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&database.pool().await)
        .await
        .unwrap();
    let error = up(&powerless(&database)).await.unwrap_err();
    let said = error.to_string();
    let MigrateError::NotAllowed {
        role,
        database: found,
        ..
    } = error
    else {
        panic!("{said}")
    };
    assert_eq!((role.as_str(), &found), ("pg_signal_backend", &name));
    assert!(
        said.contains(&format!(
            "grant create on database {name} to pg_signal_backend"
        )),
        "{said}"
    );
    let mut connection = PgConnection::connect_with(&powerless(&database))
        .await
        .unwrap();
    let error = verify(&mut connection).await.unwrap_err();
    assert!(
        matches!(error, MigrateError::SchemaTooOld { found: 0, needed, .. } if needed == newest_version()),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains("as a role with `create` on the database"),
        "{error}"
    );

    // With what it was told to get, it can, without being a superuser.
    execute(
        &database.pool().await,
        &format!("grant create on database {name} to pg_signal_backend"),
    )
    .await;
    assert_eq!(up(&powerless(&database)).await.unwrap(), MIGRATIONS.len());
    verify(&mut connection).await.unwrap();
    assert_eq!(
        down(&powerless(&database), 0).await.unwrap(),
        MIGRATIONS.len()
    );
}

#[tokio::test]
async fn processes_that_start_together_all_succeed() {
    let database = TestDatabase::empty().await;
    let mut processes = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let options = options(&database);
        processes.spawn(async move { up(&options).await.unwrap() });
    }
    let applied = within("all are done", processes.join_all()).await;
    assert_eq!(
        applied.iter().sum::<usize>(),
        MIGRATIONS.len(),
        "{applied:?}"
    );
    verify(&mut PgConnection::connect(database.url()).await.unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused_with_both_versions() {
    let database = TestDatabase::new().await;
    execute(
        &database.pool().await,
        "insert into core.schema_migrations (version, name, checksum) values (999, '0999_future', '')",
    )
    .await;
    let expected = format!(
        "the schema has version 999, this build knows versions up to {}: deploy a build that is at least as new as the newest that ran here",
        newest_version()
    );
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    assert_eq!(
        up(&options(&database)).await.unwrap_err().to_string(),
        expected
    );
    assert_eq!(
        down(&options(&database), 0).await.unwrap_err().to_string(),
        expected
    );
    assert_eq!(
        verify(&mut connection).await.unwrap_err().to_string(),
        expected
    );
    let error = nexus::start(App::discover().database_url(database.url()))
        .await
        .unwrap_err();
    assert!(
        matches!(
            &error,
            StartError::Schema(MigrateError::SchemaTooNew { found: 999, .. })
        ),
        "{error}"
    );
    let connected = Database::from_url(database.url(), "the test").unwrap();
    let error = nexus::Client::connect(&connected, "demo")
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_database_that_was_migrated_by_another_file_is_refused() {
    let database = TestDatabase::new().await;
    execute(
        &database.pool().await,
        "update core.schema_migrations set checksum = 'of another file' where version = 3",
    )
    .await;
    let error = up(&options(&database)).await.unwrap_err();
    assert!(
        matches!(
            error,
            MigrateError::Edited {
                name: "0003_nodes_and_subscriptions"
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("start with an empty database"),
        "{error}"
    );
}

#[tokio::test]
async fn a_schema_core_of_somebody_else_is_refused_and_left_alone() {
    let database = TestDatabase::empty().await;
    execute(
        &database.pool().await,
        "create schema core; create table core.events (id int)",
    )
    .await;
    let before = catalog(&database, "").await;
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    for error in [
        up(&options(&database)).await.unwrap_err(),
        down(&options(&database), 0).await.unwrap_err(),
        verify(&mut connection).await.unwrap_err(),
        up(&powerless(&database)).await.unwrap_err(),
    ] {
        assert!(matches!(error, MigrateError::ForeignSchema), "{error}");
    }
    assert_same(&catalog(&database, "").await, &before);
}

#[tokio::test]
async fn a_step_that_fails_is_rolled_back_and_done_again() {
    let database = TestDatabase::empty().await;
    up(&options(&database)).await.unwrap();
    let newest = catalog(&database, "^core$").await;
    down(&options(&database), 3).await.unwrap();
    execute(&database.pool().await, "create table core.ticks (id int)").await;
    let error = up(&options(&database)).await.unwrap_err();
    assert_eq!(error.to_string(), "migration 0005_schedules failed");
    let at: i32 = sqlx::query_scalar("select max(version) from core.schema_migrations")
        .fetch_one(&database.pool().await)
        .await
        .unwrap();
    assert_eq!(at, 4);
    execute(&database.pool().await, "drop table core.ticks").await;
    let left = usize::try_from(newest_version() - at).unwrap();
    assert_eq!(up(&options(&database)).await.unwrap(), left);
    assert_same(&catalog(&database, "^core$").await, &newest);
}

#[tokio::test]
async fn pgmq_that_is_there_is_used() {
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    pgmq::install::install_sql_from_embedded(&pool)
        .await
        .unwrap();
    let before = catalog(&database, "^pgmq$").await;
    up(&options(&database)).await.unwrap();
    assert_same(&catalog(&database, "^pgmq$").await, &before);
    execute(
        &pool,
        "select core.ensure_group('demo', 'default'); select pgmq.send('core_events_demo', '{}')",
    )
    .await;

    // Installed by hand from pgmq's file, which keeps no versions.
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    pgmq::install::install_sql_from_embedded(&pool)
        .await
        .unwrap();
    execute(&pool, "drop table pgmq.__pgmq_migrations").await;
    up(&options(&database)).await.unwrap();
    execute(&pool, "select core.ensure_group('demo', 'default')").await;
}

#[tokio::test]
async fn pgmq_that_is_too_old_is_refused_with_its_version() {
    for (found, is_refused) in [
        ("1.7.9", true),
        ("0.33.1", true),
        ("1.8.0", false),
        ("1.10.2", false),
    ] {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        pgmq::install::install_sql_from_embedded(&pool)
            .await
            .unwrap();
        sqlx::query("update pgmq.__pgmq_migrations set version = $1")
            .bind(found)
            .execute(&pool)
            .await
            .unwrap();
        match up(&options(&database)).await {
            Ok(_) => assert!(!is_refused, "{found} was accepted"),
            Err(error) => {
                assert!(is_refused, "{error}");
                assert!(
                    matches!(&error, MigrateError::PgmqTooOld { found: version } if version == found),
                    "{error}"
                );
                assert!(
                    error.to_string().starts_with(&format!(
                        "pgmq {found} is installed, nexus needs 1.8 or newer"
                    )),
                    "{error}"
                );
                assert!(catalog(&database, "^core$").await.is_empty());
            }
        }
    }
}

#[tokio::test]
async fn settings_of_the_database_do_not_matter() {
    let (plain, odd) = (TestDatabase::empty().await, TestDatabase::empty().await);
    up(&options(&plain)).await.unwrap();
    let pool = odd.pool().await;
    let name: String = sqlx::query_scalar("select quote_ident(current_database())")
        .fetch_one(&pool)
        .await
        .unwrap();
    execute(
        &pool,
        &format!(
            "create schema evil;
             create function evil.now() returns timestamptz language sql as $$ select timestamptz '2001-01-01' $$;
             create function evil.format(text, variadic text[]) returns text language sql as $$ select 'evil' $$;
             create table evil.namespaces (id int);
             alter database {name} set search_path = evil, pg_catalog;
             alter database {name} set timezone = 'Pacific/Kiritimati';
             alter database {name} set datestyle = 'German, DMY';
             alter database {name} set default_transaction_isolation = 'repeatable read';
             alter database {name} set bytea_output = 'escape';
             alter database {name} set intervalstyle = 'sql_standard'"
        ),
    )
    .await;
    up(&options(&odd)).await.unwrap();
    assert_same(
        &catalog(&odd, "^core$").await,
        &catalog(&plain, "^core$").await,
    );
    let connected = Database::from_url(odd.url(), "the test").unwrap();
    nexus::Client::connect(&connected, "demo")
        .await
        .unwrap()
        .emit(&ThingHappened {})
        .await
        .unwrap();
    let app = nexus::start(App::discover().database_url(odd.url()))
        .await
        .unwrap();
    app.client().emit(&ThingHappened {}).await.unwrap();
    app.shutdown().await;
    down(&options(&odd), 0).await.unwrap();
}

/// The application's own migrations.
async fn application() -> (tempfile::TempDir, Migrator) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("1_users.up.sql"),
        "create table users (id int primary key)",
    )
    .unwrap();
    std::fs::write(folder.path().join("1_users.down.sql"), "drop table users").unwrap();
    std::fs::write(
        folder.path().join("2_orders.up.sql"),
        "create table orders (user_id int references users)",
    )
    .unwrap();
    std::fs::write(folder.path().join("2_orders.down.sql"), "drop table orders").unwrap();
    let migrator = Migrator::new(folder.path()).await.unwrap();
    (folder, migrator)
}

#[tokio::test]
async fn migrations_of_the_application_are_not_disturbed() {
    let (_folder, migrator) = application().await;
    for application_first in [true, false] {
        let database = TestDatabase::empty().await;
        let pool = database.pool().await;
        if application_first {
            migrator.run(&pool).await.unwrap();
            up(&options(&database)).await.unwrap();
        } else {
            up(&options(&database)).await.unwrap();
            migrator.run(&pool).await.unwrap();
        }
        let applied = catalog(&database, "^public$").await;
        assert!(applied.iter().any(|line| line.contains("orders")));
        migrator.run(&pool).await.unwrap();
        down(&options(&database), 0).await.unwrap();
        assert_same(&catalog(&database, "^public$").await, &applied);
        migrator.run(&pool).await.unwrap();
        up(&options(&database)).await.unwrap();
        migrator.undo(&pool, 0).await.unwrap();
        verify(&mut PgConnection::connect(database.url()).await.unwrap())
            .await
            .unwrap();
        assert!(
            !catalog(&database, "^public$")
                .await
                .iter()
                .any(|line| line.contains("orders"))
        );
    }
}

#[tokio::test]
async fn both_migrate_at_the_same_time() {
    let (_folder, migrator) = application().await;
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    let (ours, theirs) = within("both are done", async {
        let options = options(&database);
        tokio::join!(up(&options), migrator.run(&pool))
    })
    .await;
    assert_eq!(ours.unwrap(), MIGRATIONS.len());
    theirs.unwrap();
}

#[tokio::test]
async fn pgmq_is_the_extension_where_the_server_offers_it_and_its_sql_elsewhere() {
    let database = TestDatabase::new().await;
    let (is_offered, is_extension, is_sql): (bool, bool, bool) = sqlx::query_as(
        "select exists (select from pg_available_extensions where name = 'pgmq'),
                exists (select from pg_extension where extname = 'pgmq'),
                to_regclass('pgmq.__pgmq_migrations') is not null",
    )
    .fetch_one(&database.pool().await)
    .await
    .unwrap();
    // Continuous integration runs this on a server of each kind.
    assert_eq!((is_extension, is_sql), (is_offered, !is_offered));
}
