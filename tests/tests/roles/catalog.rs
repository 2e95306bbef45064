//! What holds for every table, view and function of the schema, also those that are added later.

use super::{Test, execute, scalar, sql, texts};

/// The tables that every role may see as a whole, or that hold nothing of a namespace.
const EXEMPT: &[&str] = &[
    // Which version the schema has.
    "core.schema_migrations",
    // Each role sees its own rows.
    "core.role_access",
    // The test kit's.
    "core.test_clock",
];

#[tokio::test]
async fn every_table_keeps_the_rows_of_namespaces_apart() {
    let test = Test::new().await;
    let tables = texts(
        &test.pool,
        "select oid::regclass::text from pg_class
         where relnamespace = 'core'::regnamespace and relkind in ('r', 'p') and not relispartition order by 1",
    )
    .await;
    assert!(tables.len() >= 15, "{tables:?}");
    for table in &tables {
        if EXEMPT.contains(&table.as_str()) {
            continue;
        }
        let is_secured: bool = scalar(
            &test.pool,
            &format!("select relrowsecurity from pg_class where oid = '{table}'::regclass"),
        )
        .await;
        let policies = texts(
            &test.pool,
            &format!(
                "select concat_ws(' ', polcmd, polpermissive,
                        coalesce(pg_get_expr(polqual, polrelid), 'true') ~ 'core.role_access'
                        and coalesce(pg_get_expr(polwithcheck, polrelid), 'core.role_access') ~ 'core.role_access')
                 from pg_policy where polrelid = '{table}'::regclass order by 1"
            ),
        )
        .await;
        assert!(is_secured, "{table}: call core.isolate in its migration");
        assert!(
            policies.iter().any(|policy| policy.starts_with("r t")),
            "{table}: {policies:?}"
        );
        for policy in policies {
            // Reading, inserting and updating go by the namespaces of the role; nothing lets it delete.
            let expected = ["r t t", "a t f", "a t t", "w t t"];
            assert!(expected.contains(&policy.as_str()), "{table}: {policy}");
        }
    }
    // A partition by itself has no policy, and so no rows, and is granted to nobody.
    let open = texts(
        &test.pool,
        "select oid::regclass::text from pg_class c
         where relnamespace = 'core'::regnamespace and relispartition and relkind = 'r'
           and (not relrowsecurity or exists (select from pg_policy where polrelid = c.oid))",
    )
    .await;
    assert!(open.is_empty(), "{open:?}");
    let views = texts(
        &test.pool,
        "select oid::regclass::text from pg_class
         where relnamespace = 'core'::regnamespace and relkind in ('v', 'm')
           and not coalesce(reloptions, '{}') && '{security_invoker=true,security_invoker=on}'",
    )
    .await;
    assert!(views.is_empty(), "{views:?} run as their owner");
    test.end().await;
}

#[tokio::test]
async fn no_role_may_lock_empty_or_extend_a_shared_table() {
    let test = Test::new().await;
    let bound = test.tenant("a", "app").await;
    for suffix in ["admin", "app", "read"] {
        test.name_role(suffix);
    }
    execute(
        &test.pool,
        &format!("select core.create_roles('{}')", test.name),
    )
    .await;
    // Later partitions as well.
    execute(&test.pool, "select core.ensure_partitions(14)").await;
    for role in [bound, format!("{}_app", test.name)] {
        let too_much = texts(
            &test.pool,
            &format!(
                "select c.oid::regclass || ' ' || p from pg_class c,
                     unnest('{{UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) p
                 where c.relnamespace = 'core'::regnamespace and c.relkind in ('r', 'p', 'v')
                   and has_table_privilege('{role}', c.oid, p)
                 union all
                 select c.oid::regclass || ' ' || p from pg_class c, unnest('{{SELECT,UPDATE}}'::text[]) p
                 where c.relnamespace = 'core'::regnamespace and c.relkind = 'S'
                   and has_sequence_privilege('{role}', c.oid, p)
                 union all
                 select c.oid::regclass || ' partition' from pg_class c
                 where c.relnamespace = 'core'::regnamespace and c.relispartition and c.relkind = 'r'
                   and has_any_column_privilege('{role}', c.oid, 'SELECT,INSERT,UPDATE')
                 union all
                 select c.oid::regclass || '.' || a.attname || ' update'
                 from pg_class c join pg_attribute a on a.attrelid = c.oid
                 where c.relnamespace = 'core'::regnamespace and c.relkind in ('r', 'p') and a.attname = 'namespace'
                   and has_column_privilege('{role}', c.oid, a.attname, 'UPDATE')
                 union all
                 select n.nspname || ' ' || p from pg_namespace n, unnest('{{CREATE}}'::text[]) p
                 where n.nspname in ('core', 'pgmq') and has_schema_privilege('{role}', n.oid, p)"
            ),
        )
        .await;
        assert!(too_much.is_empty(), "{role}: {too_much:?}");
        let may: bool = scalar(
            &test.pool,
            &format!(
                "select has_any_column_privilege('{role}', 'core.nodes', 'UPDATE')
                    and has_any_column_privilege('{role}', 'core.event_log', 'INSERT')"
            ),
        )
        .await;
        assert!(may, "the question is asked rightly");
    }
    test.end().await;
}

#[tokio::test]
async fn what_runs_as_the_owner_is_for_bound_roles_and_finds_nothing_of_the_callers() {
    let test = Test::new().await;
    let open = texts(
        &test.pool,
        "select p.oid::regprocedure::text from pg_proc p
         where p.pronamespace = 'core'::regnamespace and p.prosecdef
           and (p.proacl is null or exists (select from aclexplode(p.proacl) a where a.grantee = 0)
                or not coalesce(p.proconfig, '{}') && array['search_path=pg_catalog, pg_temp'])",
    )
    .await;
    assert!(open.is_empty(), "{open:?}");
    // Others find their names by a fixed path as well, or have bound them when they were made.
    let loose = texts(
        &test.pool,
        "select p.oid::regprocedure::text from pg_proc p
         where p.pronamespace = 'core'::regnamespace and p.prosqlbody is null and proname !~ '^test_'
           and not coalesce(p.proconfig, '{}') && array['search_path=pg_catalog, pg_temp']",
    )
    .await;
    assert!(loose.is_empty(), "{loose:?}");
    test.end().await;
}

#[tokio::test]
async fn the_owner_pays_nothing() {
    let test = Test::new().await;
    let bound = test.tenant("a", "app").await;
    let secured = texts(
        &test.pool,
        "select oid::regclass::text from pg_class
         where relnamespace = 'core'::regnamespace and relkind in ('r', 'p') and row_security_active(oid)",
    )
    .await;
    assert!(secured.is_empty(), "{secured:?}");
    let mut tenant = test.connect_as(&bound).await;
    for statement in [
        "select * from core.event_log where namespace = 'a' and event_type = 't' and emitted_at > core.now()",
        "insert into core.event_log (namespace, event_type, payload, producer_node_id) values ('a', 't', '{}', 'n')",
        "select * from core.subscriptions where namespace = 'a' and event_type = 't'",
        "select subscriptions_version from core.namespaces where namespace = 'a'",
    ] {
        let explain = format!("explain (costs off) {statement}");
        let owners = texts(&test.pool, &explain).await.join("\n");
        let tenants = texts(&mut tenant, &explain).await.join("\n");
        assert!(!owners.contains("role_access"), "{owners}");
        assert!(tenants.contains("role_access"), "{tenants}");
        // What is asked of the role is asked once, and the index still serves the question.
        assert!(!tenants.contains("SubPlan"), "{tenants}");
        for line in owners.lines().filter(|line| line.contains("Index Cond")) {
            assert!(tenants.contains(line.trim()), "{tenants}");
        }
    }
    // The queues know no policies at all.
    let queues: i64 = sqlx::query_scalar(sql(
        "select count(*) from pg_class where relnamespace = 'pgmq'::regnamespace and relrowsecurity",
    ))
    .fetch_one(&test.pool)
    .await
    .unwrap();
    assert_eq!(queues, 0);
    drop(tenant);
    test.end().await;
}
