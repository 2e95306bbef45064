//! Roles are made and bound by one command each; the schema is migrated by its owner and verified by
//! everybody else.

use std::str::FromStr;

use nexus::{
    App, Database, StartError,
    client::{Access, RoleError},
    testing::TestDatabase,
};
use nexus_migrations::{MigrateError, down, newest_version, up};
use sqlx::postgres::PgConnectOptions;

use super::{Test, execute, refused, scalar, texts};

/// An empty database in which a role without further rights owns the schema.
async fn owned(attributes: &str) -> (Test, String) {
    let test = Test::on(TestDatabase::empty().await).await;
    let owner = test.role("owner").await;
    execute(
        &test.pool,
        &format!(
            "alter role {owner} {attributes}; grant create on database {} to {owner}",
            test.name
        ),
    )
    .await;
    let options = PgConnectOptions::from_str(&test.url_of(&owner)).unwrap();
    assert!(up(&options).await.unwrap() > 0);
    (test, owner)
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, RoleError>) -> String {
    match answer {
        Err(RoleError::Refused { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

/// Drops all that the roles of a test have got, which only a role with their rights can.
async fn end(test: Test, owner: &str) {
    let options = PgConnectOptions::from_str(&test.url_of(owner)).unwrap();
    down(&options, 0).await.unwrap();
    // pgmq stays, and is the owner's.
    let mut session = test.connect_as(owner).await;
    execute(&mut session, "drop schema pgmq cascade").await;
    // From 16 on a role is dropped by who has made it.
    let roles = test.roles.lock().unwrap().clone();
    for role in roles {
        let drop = super::sql(&format!("drop role if exists {role}"));
        let _ = sqlx::raw_sql(drop).execute(&mut session).await;
    }
    drop(session);
    execute(
        &test.pool,
        &format!("revoke create on database {} from {owner}", test.name),
    )
    .await;
    let roles = std::mem::take(&mut *test.roles.lock().unwrap());
    for role in roles.into_iter().rev() {
        execute(&test.pool, &format!("drop role if exists {role}")).await;
    }
}

#[tokio::test]
async fn one_command_makes_the_roles_and_another_binds_one() {
    let (test, owner) = owned("createrole").await;
    let database = Database::from_url(&test.url_of(&owner), "the test").unwrap();
    for suffix in ["admin", "app", "read"] {
        test.name_role(suffix);
    }
    for _ in 0..2 {
        let made = database.create_roles(&test.name).await.unwrap();
        let names: Vec<&str> = made.iter().map(|role| role.name.as_str()).collect();
        let expected = ["admin", "app", "read"].map(|suffix| format!("{}_{suffix}", test.name));
        assert_eq!(names, expected);
        assert!(made.iter().all(|role| role.may.len() > 10));
        // From 16 on a role cannot pass itself on; the note says who has to.
        let version: i32 = scalar(
            &test.pool,
            "select current_setting('server_version_num')::int",
        )
        .await;
        match &made[0].note {
            None => assert!(version < 16_00_00),
            Some(note) => assert!(
                note.contains(&format!("grant {owner} to {}_admin", test.name)),
                "{note}"
            ),
        }
    }
    let logins = texts(
        &test.pool,
        &format!(
            "select rolname::text from pg_roles where rolname ~ '^{}_(admin|app|read)$' and rolcanlogin",
            test.name
        ),
    )
    .await;
    assert!(logins.is_empty(), "{logins:?}");

    // A role that is not there is made, and cannot log in either.
    let shop = test.name_role("shop");
    database
        .grant_namespace("shop", &shop, Access::App)
        .await
        .unwrap();
    // Not everybody may look.
    let mut session = test.connect_as(&owner).await;
    let bound = format!(
        "select concat_ws(' ', namespace, access) from core.role_access where role = '{shop}'::regrole order by 1"
    );
    assert_eq!(texts(&mut session, &bound).await, ["shop app"]);
    database
        .grant_namespace("shop", &shop, Access::Read)
        .await
        .unwrap();
    database
        .grant_namespace("mall", &shop, Access::Read)
        .await
        .unwrap();
    assert_eq!(
        texts(&mut session, &bound).await,
        ["mall read", "shop read"]
    );
    let mut may = async |what: &str| {
        let question = format!("select {}", what.replace("{shop}", &shop));
        scalar::<bool>(&mut session, &question).await
    };
    assert!(!may("has_any_column_privilege('{shop}', 'core.nodes', 'update')").await);
    assert!(may("has_table_privilege('{shop}', 'pgmq.q_core_events_mall', 'select')").await);
    assert!(!may("has_table_privilege('{shop}', 'pgmq.q_core_events_mall', 'insert')").await);
    assert!(database.revoke_namespace("mall", &shop).await.unwrap());
    assert!(!database.revoke_namespace("mall", &shop).await.unwrap());
    assert!(!may("has_table_privilege('{shop}', 'pgmq.q_core_events_mall', 'select')").await);
    assert!(may("has_table_privilege('{shop}', 'pgmq.q_core_events_shop', 'select')").await);
    // With the last namespace goes everything, so that the role can be dropped.
    assert!(database.revoke_namespace("shop", &shop).await.unwrap());
    execute(&test.pool, &format!("drop role {shop}")).await;
    drop(session);
    end(test, &owner).await;
}

#[tokio::test]
async fn what_cannot_be_granted_is_refused_with_what_to_do() {
    let (test, owner) = owned("nocreaterole").await;
    let database = Database::from_url(&test.url_of(&owner), "the test").unwrap();
    let reason = refusal(database.create_roles(&test.name).await);
    assert!(
        reason.contains(&format!(
            "role \"{0}_admin\" does not exist, and role \"{owner}\" may not make roles: as one that may, run create role {0}_admin",
            test.name
        )),
        "{reason}"
    );
    let reason = refusal(
        database
            .grant_namespace("shop", "nexus none", Access::App)
            .await,
    );
    assert!(
        reason.contains("run create role \"nexus none\""),
        "{reason}"
    );
    // Nothing is left of it.
    let mut session = test.connect_as(&owner).await;
    let made: i64 = scalar(&mut session, "select count(*) from core.namespaces").await;
    assert_eq!(made, 0);
    drop(session);

    let reason = refusal(database.grant_namespace("shop", &owner, Access::App).await);
    assert!(
        reason.contains(&format!(
            "it is, or can become, role \"{owner}\", which owns schema core"
        )),
        "{reason}"
    );
    let superuser: Option<String> = sqlx::query_scalar(
        "select rolname::text from pg_roles where rolsuper order by oid limit 1",
    )
    .fetch_optional(&test.pool)
    .await
    .unwrap();
    let reason = refusal(
        database
            .grant_namespace("shop", &superuser.unwrap(), Access::App)
            .await,
    );
    assert!(reason.contains("it is a superuser"), "{reason}");
    let reason = refusal(
        database
            .grant_namespace("shop", "pg_monitor", Access::App)
            .await,
    );
    assert!(
        reason.contains("to which pgmq shows all queues"),
        "{reason}"
    );
    let reason = refusal(
        database
            .grant_namespace("shop", "pg_read_all_data", Access::Read)
            .await,
    );
    assert!(reason.contains("reads or writes all tables"), "{reason}");
    let reason = refusal(
        database
            .grant_namespace("sh__op", &owner, Access::App)
            .await,
    );
    assert!(
        reason.contains("namespace \"sh__op\" is refused"),
        "{reason}"
    );

    // A role that exists can be bound by an owner that may not make any.
    let shop = test.role("shop").await;
    database
        .grant_namespace("shop", &shop, Access::App)
        .await
        .unwrap();
    // Only the owner gives rights.
    let theirs = Database::from_url(&test.url_of(&shop), "the test").unwrap();
    let reason = refusal(theirs.grant_namespace("mall", &shop, Access::App).await);
    assert!(
        reason.contains(&format!(
            "run this as role \"{owner}\", which owns schema core"
        )),
        "{reason}"
    );
    database.revoke_namespace("shop", &shop).await.unwrap();
    end(test, &owner).await;
}

#[tokio::test]
async fn roles_of_another_database_are_used_and_mean_nothing_here() {
    let (first, first_owner) = owned("createrole").await;
    let (second, second_owner) = owned("nocreaterole").await;
    let shop = first.role("shop").await;
    for suffix in ["admin", "app", "read"] {
        first.name_role(suffix);
    }
    let in_first = Database::from_url(&first.url_of(&first_owner), "the test").unwrap();
    let in_second = Database::from_url(&second.url_of(&second_owner), "the test").unwrap();
    in_first.create_roles(&first.name).await.unwrap();
    in_first
        .grant_namespace("shop", &shop, Access::App)
        .await
        .unwrap();
    // The same namespace in the other database is another one.
    let mut session = second.connect_as(&shop).await;
    refused(&mut session, "select core.emit('shop', 'x', '{}')").await;
    drop(session);
    let made = in_second.create_roles(&first.name).await.unwrap();
    assert_eq!(made.len(), 3);
    in_second
        .grant_namespace("mall", &shop, Access::App)
        .await
        .unwrap();
    let mut session = second.connect_as(&shop).await;
    execute(&mut session, "select core.emit('mall', 'x', '{}')").await;
    refused(&mut session, "select core.emit('shop', 'x', '{}')").await;
    drop(session);
    in_second.revoke_namespace("mall", &shop).await.unwrap();
    end(second, &second_owner).await;
    end(first, &first_owner).await;
}

#[tokio::test]
async fn application_roles_verify_and_say_who_has_to_migrate() {
    let (test, owner) = owned("createrole").await;
    let admin = PgConnectOptions::from_str(&test.url_of(&owner)).unwrap();
    let shop = test.name_role("shop");
    execute(
        &test.pool,
        &format!("create role {shop} login password '{}'", super::PASSWORD),
    )
    .await;
    let grant = format!("select core.grant_namespace('shop', '{shop}')");
    let mut session = test.connect_as(&owner).await;
    execute(&mut session, &grant).await;
    drop(session);
    let start = |role: &str| {
        nexus::start(
            App::discover()
                .only(["count"])
                .name("x")
                .namespace("shop")
                .database_url(test.url_of(role)),
        )
    };
    start(&shop).await.unwrap().shutdown().await;

    // Older: what a roll-out meets whose migration is still to come. Its rights went with the step.
    down(&admin, newest_version() - 1).await.unwrap();
    execute(
        &test.pool,
        &format!("grant {owner} to current_user; grant usage on schema core to {shop}; grant select on core.schema_migrations to {shop}"),
    )
    .await;
    let error = start(&shop).await.unwrap_err();
    let StartError::Schema(error) = &error else {
        panic!("{error}")
    };
    assert!(
        matches!(error, MigrateError::SchemaTooOld { .. }),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        format!(
            "the schema has version {}, this build needs {}, and role `{shop}` may not change it: start an app of this build, or call `Database::migrate`, as role `{owner}`, which owns it",
            newest_version() - 1,
            newest_version()
        )
    );
    // A client does not migrate, whoever it is.
    let client = nexus::Client::connect(
        &Database::from_url(&test.url_of(&owner), "the test").unwrap(),
        "shop",
    )
    .await
    .unwrap_err();
    assert!(
        client.to_string().ends_with(&format!("as role `{owner}`")),
        "{client}"
    );
    up(&admin).await.unwrap();
    let mut session = test.connect_as(&owner).await;
    execute(&mut session, &grant).await;

    // Newer.
    execute(
        &mut session,
        "insert into core.schema_migrations (version, name, checksum) values (999, '0999_future', '')",
    )
    .await;
    let error = start(&shop).await.unwrap_err();
    assert!(
        matches!(
            &error,
            StartError::Schema(MigrateError::SchemaTooNew { found: 999, .. })
        ),
        "{error}"
    );
    execute(
        &mut session,
        "delete from core.schema_migrations where version = 999",
    )
    .await;

    // A role that nobody has bound.
    let stranger = test.role("stranger").await;
    let error = start(&stranger).await.unwrap_err();
    let StartError::Schema(error) = &error else {
        panic!("{error}")
    };
    assert!(
        error.to_string().contains(&format!(
            "select core.grant_namespace('<namespace>', '{stranger}')"
        )),
        "{error}"
    );
    execute(
        &mut session,
        &format!("select core.revoke_namespace('shop', '{shop}')"),
    )
    .await;
    drop(session);
    end(test, &owner).await;
}

/// Whoever migrates, what is made belongs to the owner: else what runs as the owner could not use it.
#[tokio::test]
async fn members_of_the_owner_migrate_for_it() {
    let (test, owner) = owned("createrole").await;
    for suffix in ["admin", "app", "read"] {
        test.name_role(suffix);
    }
    let database = Database::from_url(&test.url_of(&owner), "the test").unwrap();
    let made = database.create_roles(&test.name).await.unwrap();
    let operator = test.role("operator").await;
    execute(
        &test.pool,
        &format!("grant {}_admin to {operator}", test.name),
    )
    .await;
    if made[0].note.is_some() {
        // From 16 on somebody with the right to pass the owner on does as the note says.
        execute(&test.pool, &format!("grant {owner} to {}_admin", test.name)).await;
    }
    let options = PgConnectOptions::from_str(&test.url_of(&operator)).unwrap();
    assert_eq!(
        down(&options, 5).await.unwrap(),
        usize::try_from(newest_version() - 5).unwrap()
    );
    assert!(up(&options).await.unwrap() > 0);
    let others = texts(
        &test.pool,
        &format!(
            "select oid::regclass::text from pg_class
             where relnamespace = 'core'::regnamespace and relowner <> '{owner}'::regrole
             union all
             select oid::regprocedure::text from pg_proc
             where pronamespace = 'core'::regnamespace and proowner <> '{owner}'::regrole"
        ),
    )
    .await;
    assert!(others.is_empty(), "{others:?}");
    // And gives rights.
    let theirs = Database::from_url(&test.url_of(&operator), "the test").unwrap();
    let shop = test.role("shop").await;
    theirs
        .grant_namespace("shop", &shop, Access::App)
        .await
        .unwrap();
    assert!(theirs.revoke_namespace("shop", &shop).await.unwrap());
    end(test, &owner).await;
}

#[tokio::test]
async fn the_page_about_roles_works_as_printed() {
    let test = Test::new().await;
    let (ada, grace) = (test.role("ada").await, test.role("grace").await);
    for suffix in ["admin", "app", "read", "shop_app", "shop_reader"] {
        test.name_role(suffix);
    }
    let page = include_str!("../../../docs/roles.md");
    let blocks: Vec<String> = page
        .split("```sql\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"))
        .map(|(block, _)| {
            block
                .replace("create_roles()", &format!("create_roles('{}')", test.name))
                .replace("nexus_app to ada", &format!("{}_app to {ada}", test.name))
                .replace(
                    "nexus_read to grace",
                    &format!("{}_read to {grace}", test.name),
                )
                .replace("'shop_", &format!("'{}_shop_", test.name))
        })
        .collect();
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        execute(&test.pool, &block).await;
    }
    let bound = texts(
        &test.pool,
        "select concat_ws(' ', role, namespace, access) from core.role_access order by 1",
    )
    .await;
    let expected = ["_app * app", "_read * read", "_shop_app shop app"];
    assert_eq!(bound, expected.map(|line| format!("{}{line}", test.name)));
    test.end().await;
}

/// What a later migration adds is granted to the roles that are there.
#[tokio::test]
async fn new_tables_groups_and_partitions_are_granted() {
    let test = Test::new().await;
    let role = test.tenant("a", "app").await;
    execute(
        &test.pool,
        "create table core.later (namespace text, what text);
         select core.isolate('core.later', true, true);
         select core.refresh_roles();
         insert into core.later values ('a', 'mine'), ('b', 'theirs');
         select core.ensure_group('a', 'later')",
    )
    .await;
    test.database
        .advance(std::time::Duration::from_hours(24 * 60))
        .await;
    let mut session = test.connect_as(&role).await;
    execute(
        &mut session,
        "select pgmq.send('core_events_a__later', '{}'), pgmq.send('core_events_a__later_dlq', '{}');
         select core.ensure_partitions(); select core.emit('a', 'x', '{}');
         insert into core.later values ('a', 'more'); update core.later set what = what || '!'",
    )
    .await;
    let seen = texts(&mut session, "select what from core.later order by 1").await;
    assert_eq!(seen, ["mine!", "more!"]);
    refused(&mut session, "insert into core.later values ('b', 'more')").await;
    drop(session);
    let theirs = texts(
        &test.pool,
        "select what from core.later where namespace = 'b'",
    )
    .await;
    assert_eq!(theirs, ["theirs"]);
    test.end().await;
}
