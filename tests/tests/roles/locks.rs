//! What a role that is bound to one namespace can hold up for others: nothing of theirs; and what
//! everybody needs for a limited time, with an error that names who holds it.

use std::{str::FromStr, time::Duration};

use nexus::{App, Database, client::Access};
use nexus_migrations::{MigrateError, down, newest_version, up};
use nexus_tests::within;
use sqlx::{Connection, postgres::PgConnectOptions};

use super::{Test, execute, refused, scalar};

/// Every number that the schema has ever locked by, and those of pgmq.
const NUMBERS: &str = "
    select pg_advisory_lock(hashtextextended('nexus: partitions', 0));
    select pg_advisory_lock(hashtextextended('nexus: register a', 0));
    select pg_advisory_lock(hashtextextended('nexus: core_events_a', 0));
    select pg_advisory_lock(hashtextextended('nexus: drop partitions', 0));
    select pg_advisory_lock(x'6e65787573'::bigint << 16 | 1);";

#[tokio::test]
async fn locks_by_number_hold_up_no_app() {
    let test = Test::new().await;
    let a = test.tenant("a", "app").await;
    let b = test.tenant("b", "app").await;
    let mut attacker = test.connect_as(&b).await;
    execute(&mut attacker, NUMBERS).await;
    // In a transaction that stays open, with all that it can lock in its own namespace.
    execute(
        &mut attacker,
        "begin;
         select core.lock_registrations('b'), core.lock_registrations('a');
         select core.ensure_group('b', 'held');
         select core.emit('b', 'thing.done', '{}');
         select core.maintain('b')",
    )
    .await;
    for url in [test.url_of(&a), test.database.url().to_owned()] {
        let app = App::discover()
            .only(["count"])
            .name("billing")
            .namespace("a")
            .database_url(url)
            .idle_poll(Duration::from_millis(25));
        let app = within("the app starts", nexus::start(app)).await.unwrap();
        within("it stops", app.shutdown()).await;
    }
    // Partitions are made, and so is another group.
    test.database.advance(Duration::from_hours(24 * 40)).await;
    let made: i32 = scalar(&test.pool, "select core.ensure_partitions()").await;
    assert!(made > 0);
    execute(&test.pool, "select core.ensure_group('a', 'another')").await;
    let _ = attacker.close().await;
    test.end().await;
}

#[tokio::test]
async fn migrations_wait_for_no_number_and_name_who_holds_them_up() {
    let test = Test::new().await;
    let b = test.tenant("b", "app").await;
    let mut attacker = test.connect_as(&b).await;
    execute(&mut attacker, NUMBERS).await;
    let options = PgConnectOptions::from_str(test.database.url()).unwrap();
    let before = newest_version() - 1;
    // Also with a connection that gives up at once.
    let hasty = options.clone().options([("lock_timeout", "200ms")]);
    assert_eq!(
        within("it goes back", down(&hasty, before)).await.unwrap(),
        1
    );
    assert_eq!(within("it comes again", up(&hasty)).await.unwrap(), 1);

    within("it goes back", down(&options, before))
        .await
        .unwrap();
    let mut other = sqlx::PgConnection::connect(test.database.url())
        .await
        .unwrap();
    execute(
        &mut other,
        "begin; lock table core.schema_migrations in share row exclusive mode",
    )
    .await;
    let pid: i32 = scalar(&mut other, "select pg_backend_pid()").await;
    let error = up(&hasty).await.unwrap_err();
    assert!(matches!(error, MigrateError::Locked { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&format!("session {pid} of role")),
        "{error}"
    );
    let _ = other.close().await;
    within("it comes again", up(&options)).await.unwrap();
    let _ = attacker.close().await;
    test.end().await;
}

#[tokio::test]
async fn who_holds_up_the_others_is_named() {
    let test = Test::new().await;
    let b = test.tenant("b", "app").await;
    // The same limits, sooner.
    execute(
        &test.pool,
        "alter function core.lock_registrations(text) set lock_timeout = '200ms';
         alter function core.lock_role_access() set lock_timeout = '200ms';
         alter function core.ensure_group(text, text) set lock_timeout = '200ms'",
    )
    .await;
    let mut holder = test.connect_as(&b).await;
    let pid: i32 = scalar(&mut holder, "select pg_backend_pid()").await;
    let named = format!("session {pid} of role \"{b}\"");
    let mut waiting = test.pool.acquire().await.unwrap();

    execute(&mut holder, "begin; select core.lock_registrations('b')").await;
    let error = refused(&mut waiting, "select core.lock_registrations('b')").await;
    assert!(
        error.contains("registrations in namespace \"b\" are locked") && error.contains(&named),
        "{error}"
    );
    execute(
        &mut holder,
        "rollback; begin; select core.ensure_group('b', 'new')",
    )
    .await;
    let error = refused(
        &mut waiting,
        "select core.grant_namespace('b', 'nexus_none')",
    )
    .await;
    assert!(
        error.contains("roles cannot be changed while a new group is being made")
            && error.contains(&named),
        "{error}"
    );
    execute(
        &mut holder,
        "rollback; select pg_advisory_lock(hashtext('pgmq.queue_core_events_a__new'))",
    )
    .await;
    let error = refused(&mut waiting, "select core.ensure_group('a', 'new')").await;
    assert!(
        error.contains("the queue of group \"new\" in namespace \"a\" cannot be made")
            && error.contains(&named),
        "{error}"
    );
    // Rights that are being given hold up a new group, and that is all.
    let mut owner = test.pool.begin().await.unwrap();
    execute(
        &mut *owner,
        &format!("select core.grant_namespace('b', '{b}')"),
    )
    .await;
    let error = refused(&mut waiting, "select core.ensure_group('b', 'newer')").await;
    assert!(error.contains("while roles are being changed"), "{error}");
    execute(
        &mut *waiting,
        "select core.ensure_group('b', 'default'); select core.emit('b', 'thing.done', '{}')",
    )
    .await;
    owner.rollback().await.unwrap();
    let _ = holder.close().await;
    drop(waiting);
    test.end().await;
}

/// What a role is bound to while a group is being made is granted to it.
#[tokio::test]
async fn a_group_that_is_made_while_a_role_is_bound_is_granted() {
    let test = Test::new().await;
    let first = test.tenant("b", "app").await;
    let second = test.role("second").await;
    let mut maker = test.connect_as(&first).await;
    execute(&mut maker, "begin; select core.ensure_group('b', 'new')").await;
    let database = Database::from_url(test.database.url(), "the test").unwrap();
    let bind = tokio::spawn({
        let second = second.clone();
        async move { database.grant_namespace("b", &second, Access::App).await }
    });
    nexus_tests::until("the other waits", || async {
        let waits: bool = scalar(
            &test.pool,
            "select exists (select from pg_locks where relation = 'core.role_access'::regclass and not granted)",
        )
        .await;
        waits.then_some(())
    })
    .await;
    execute(&mut maker, "commit").await;
    within("the role is bound", bind).await.unwrap().unwrap();
    let mut session = test.connect_as(&second).await;
    execute(&mut session, "select pgmq.send('core_events_b__new', '{}')").await;
    for session in [maker, session] {
        let _ = session.close().await;
    }
    test.end().await;
}
