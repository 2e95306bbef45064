//! What a role that is bound to namespace `b` tries against namespace `a`: each statement is refused, or
//! sees and changes nothing, and all that `a` has is as before.

use sqlx::{Connection, PgConnection, PgPool, Row};

use super::{Test, execute, refused, scalar, sql, texts};

/// All that a namespace has, a line for each row.
async fn state(pool: &PgPool, namespace: &str) -> Vec<String> {
    let tables = texts(
        pool,
        "select format('select %L || to_jsonb(t)::text from %s t where t.namespace = ''{ns}''', c.oid::regclass || ' ', c.oid::regclass)
         from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'namespace'
         where c.relnamespace = 'core'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition",
    )
    .await;
    let queues = texts(
        pool,
        &format!(
            "select format('select %L || to_jsonb(t)::text from %s t', c.oid::regclass || ' ', c.oid::regclass)
             from core.groups g join pg_class c on c.relnamespace = 'pgmq'::regnamespace
                 and c.relname ~ ('^[qa]_' || g.queue_name || '(_dlq)?$')
             where g.namespace = '{namespace}'"
        ),
    )
    .await;
    let mut lines = Vec::new();
    for query in tables.into_iter().chain(queues) {
        lines.extend(texts(pool, &query.replace("{ns}", namespace)).await);
    }
    lines.extend(
        texts(
            pool,
            &format!(
                "select 'tick ' || to_jsonb(k)::text from core.ticks k join core.scheduled_tasks t using (task_id)
                 where t.namespace = '{namespace}'"
            ),
        )
        .await,
    );
    // What the tables are like, and that they are there.
    lines.extend(
        texts(
            pool,
            "select format('%s %s %s %s', c.oid::regclass, c.relowner, c.relrowsecurity, c.relhastriggers)
             from pg_class c where c.relnamespace in ('core'::regnamespace, 'pgmq'::regnamespace)
               and c.relkind in ('r', 'p', 'v', 'S') and c.relname !~ 'core_events_b'",
        )
        .await,
    );
    lines.sort();
    lines
}

/// Two namespaces with one of everything each, of which `secret` tells them apart.
async fn furnish(pool: &PgPool, namespace: &str) {
    execute(
        pool,
        &format!(
            "select core.ensure_group('{namespace}', 'default'), core.ensure_group('{namespace}', 'billing');
             insert into core.nodes (node_id, namespace, app, build_id, program, last_heartbeat)
             values ('{namespace}-1', '{namespace}', 'shop', 'build', 'shop', core.now() - interval '1 hour');
             insert into core.builds (namespace, app, build_id) values ('{namespace}', 'shop', 'build');
             insert into core.event_types (namespace, event_type, version, app, schema, fingerprint)
             values ('{namespace}', 'thing.done', 1, 'shop', '{{}}', 'f');
             insert into core.renames (namespace, group_name, former, handler) values ('{namespace}', 'default', 'old', 'h');
             select core.subscribe('{namespace}', 'shop',
                 '[{{\"group\": \"default\", \"handler\": \"h\", \"eventType\": \"thing.done\"}},
                   {{\"group\": \"billing\", \"handler\": \"i\", \"eventType\": \"thing.done\"}}]');
             select core.subscribe('{namespace}', 'shop',
                 '[{{\"group\": \"default\", \"handler\": \"gone\", \"eventType\": \"thing.gone\"}}]');
             select core.retire('{namespace}', 'default', 'gone', 'drop');
             update core.subscriptions set since_snapshot = null where namespace = '{namespace}';
             select core.start_replay('{namespace}', 'default', 'h', null, null, null, null, null, null, null);
             select core.emit('{namespace}', 'thing.done', '{{\"secret\": \"{namespace}\"}}', '{{\"idempotencyKey\": \"k\"}}');
             select core.emit('{namespace}', 'thing.done', '{{\"secret\": \"{namespace}\"}}');
             select core.emit('{namespace}', 'thing.done', '{{\"secret\": \"{namespace}\"}}');
             select core.emit('{namespace}', 'thing.done', '{{\"secret\": \"{namespace}\"}}', '{{\"after\": \"1 day\", \"idempotencyKey\": \"d\"}}');
             insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, payload, next_run_at)
             values ('{namespace}', 'nightly', '@daily', 'thing.done', '{{\"secret\": \"{namespace}\"}}', core.now() + interval '1 day');
             select core.run_task_now(task_id) from core.scheduled_tasks where namespace = '{namespace}';
             select core.dead_letter('core_events_{namespace}', 1, 0, 'Attempts exhausted', 'secret', 1, '[]');
             select pgmq.archive('core_events_{namespace}', 2::bigint);
             select pgmq.send('core_events_{namespace}', '{{\"eventType\": \"thing.done\"}}', core.now() + interval '1 day')"
        ),
    )
    .await;
}

/// The victim, the attacker, and what the attacker may know of the victim.
struct Stage {
    test: Test,
    attacker: String,
    /// By the name it has in statements.
    known: Vec<(&'static str, String)>,
}

impl Stage {
    async fn new() -> Self {
        let test = Test::new().await;
        let victim = test.tenant("a", "app").await;
        let attacker = test.tenant("b", "app").await;
        for namespace in ["a", "b"] {
            furnish(&test.pool, namespace).await;
        }
        test.own_schema(&attacker).await;
        execute(&test.pool, "analyze").await;
        let of = |what: &str| {
            let what = what.to_owned();
            let pool = test.pool.clone();
            async move { scalar::<String>(&pool, &what).await }
        };
        let known = vec![
            (
                "{delayed}",
                of("select event_id::text from core.delayed_emits where namespace = 'a'").await,
            ),
            (
                "{task}",
                of("select task_id::text from core.scheduled_tasks where namespace = 'a'").await,
            ),
            (
                "{replay}",
                of("select replay_id::text from core.replays where namespace = 'a'").await,
            ),
            (
                "{retired}",
                of("select subscription_id::text from core.retirements where namespace = 'a'").await,
            ),
            (
                "{epoch}",
                of("select epoch::text from core.nodes where namespace = 'a'").await,
            ),
            (
                "{event}",
                of("select min(event_id)::text from core.event_log where namespace = 'a'").await,
            ),
            (
                "{partition}",
                of("select min(inhrelid::regclass::text) from pg_inherits where inhparent = 'core.event_log'::regclass").await,
            ),
            ("{owner}", of("select pg_get_userbyid(core.owner())::text").await),
            ("{victim}", victim),
            ("{attacker}", attacker.clone()),
        ];
        Self {
            test,
            attacker,
            known,
        }
    }

    fn fill(&self, statement: &str) -> String {
        self.known
            .iter()
            .fold(statement.to_owned(), |text, (name, value)| {
                text.replace(name, value)
            })
    }

    /// Runs a statement in a session that nothing is left in of the one before.
    async fn attack(
        &self,
        session: &mut PgConnection,
        statement: &str,
    ) -> sqlx::Result<Vec<sqlx::postgres::PgRow>> {
        execute(&mut *session, "rollback").await;
        execute(&mut *session, "discard all").await;
        // A lock that it waits for would be one that it could have had.
        execute(&mut *session, "set lock_timeout = '2s'").await;
        sqlx::raw_sql(sql(&self.fill(statement)))
            .fetch_all(session)
            .await
    }

    async fn unchanged(&self, before: &[String], statements: &[&str]) {
        let after = state(&self.test.pool, "a").await;
        let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
        let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
        assert!(
            lost.is_empty() && new.is_empty(),
            "{statements:#?}\ntook {lost:#?}\nbrought {new:#?}"
        );
    }

    /// Each statement fails.
    async fn all_refused(&self, statements: &[&str]) {
        let before = state(&self.test.pool, "a").await;
        let mut session = self.test.connect_as(&self.attacker).await;
        for statement in statements {
            let answer = self.attack(&mut session, statement).await;
            assert!(answer.is_err(), "not refused: {}", self.fill(statement));
            let error = answer.err().unwrap();
            let error = error.as_database_error();
            let code = error.and_then(|error| error.code().map(String::from));
            // Not for a mistake in the statement itself.
            let code = code.unwrap_or_default();
            let message = error.map(ToString::to_string);
            assert!(
                !["42601", "42703", "42883", "42P02", "42725", "3F000"].contains(&code.as_str()),
                "{}: {message:?}",
                self.fill(statement)
            );
        }
        let _ = session.close().await;
        self.unchanged(&before, statements).await;
    }

    /// Each statement is denied, or answers with nothing: no row, null, 0, false or an empty array.
    async fn all_blind(&self, statements: &[&str]) {
        let before = state(&self.test.pool, "a").await;
        let mut session = self.test.connect_as(&self.attacker).await;
        for statement in statements {
            let wrapped = format!(
                "select count(*) from ({statement}) as q
                 where (select string_agg(v.value, '') from jsonb_each_text(to_jsonb(q)) v
                        where v.value not in ('0', 'false', '', '{{}}', '[]')) is not null"
            );
            match self.attack(&mut session, &wrapped).await {
                Ok(rows) => {
                    let seen: i64 = rows[0].get(0);
                    assert_eq!(seen, 0, "{} sees something", self.fill(statement));
                }
                Err(error) => assert!(
                    is_denied(&error),
                    "{} failed for another reason: {error}",
                    self.fill(statement)
                ),
            }
        }
        let _ = session.close().await;
        self.unchanged(&before, statements).await;
    }

    /// Each statement may run or fail, and changes nothing.
    async fn all_harmless(&self, statements: &[&str]) {
        let before = state(&self.test.pool, "a").await;
        let mut session = self.test.connect_as(&self.attacker).await;
        for statement in statements {
            let _ = self.attack(&mut session, statement).await;
        }
        execute(&mut session, "rollback").await;
        let _ = session.close().await;
        self.unchanged(&before, statements).await;
    }
}

/// Privileges, policies, unknown namespaces.
fn is_denied(error: &sqlx::Error) -> bool {
    let code = error
        .as_database_error()
        .and_then(|error| error.code().map(String::from));
    matches!(code.as_deref(), Some("42501" | "23503"))
}

#[tokio::test]
async fn no_table_of_another_namespace_can_be_read_changed_or_held() {
    let stage = Stage::new().await;
    let pool = &stage.test.pool;
    let tables = texts(
        pool,
        "select c.oid::regclass::text from pg_class c
         where c.relnamespace = 'core'::regnamespace and c.relkind in ('r', 'p')
           and c.relname not in ('schema_migrations', 'test_clock')
           -- Of many partitions one is like the other.
           and c.relname !~ '^event_log_2.*_(02|03|04|05|06|07|08|09|10|11|12)$'
         union all
         select c.oid::regclass::text from core.groups g join pg_class c on c.relnamespace = 'pgmq'::regnamespace
             and c.relname ~ ('^[qa]_' || g.queue_name || '(_dlq)?$')
         where g.namespace = 'a' order by 1",
    )
    .await;
    assert!(tables.len() > 20, "{tables:?}");
    for table in &tables {
        let target = Target::new(&stage, table).await;
        let Target { of_a, any, .. } = &target;
        stage
            .all_blind(&[
                &format!("select * from {table} where {of_a}"),
                &format!("select 1 as n from {table} where {of_a} for update"),
            ])
            .await;
        let refused = target.refused(&stage).await;
        let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
        stage.all_refused(&refused).await;
        stage
            .all_harmless(&[
                &format!("update {table} set {any} = {any} where {of_a}"),
                &format!("grant select on {table} to {{attacker}}"),
                &format!("analyze {table}"),
                &format!("vacuum {table}"),
                &format!("insert into {table} default values"),
            ])
            .await;
    }
    stage.test.end().await;
}

/// A table that the attacker must not get at.
struct Target<'a> {
    table: &'a str,
    has_namespace: bool,
    /// The condition of the victim's rows.
    of_a: &'static str,
    /// A column that is not the namespace.
    any: String,
}

const TABLES_REFUSED: &[&str] = &[
    "delete from {table}",
    "delete from {table} where {of_a}",
    "truncate {table}",
    "begin; lock table {table} in access exclusive mode",
    "begin; lock table {table} in share mode",
    "begin; lock table {table} in share update exclusive mode",
    "alter table {table} disable row level security",
    "alter table {table} add column x int",
    "alter table {table} owner to {attacker}",
    "alter table {table} set (fillfactor = 10)",
    "drop table {table} cascade",
    "create policy mine on {table} using (true)",
    "create index on {table} ({any})",
    "create trigger t before insert on {table} for each row execute function core.reschedule()",
    "create rule r as on insert to {table} do nothing",
    "create table {attacker}.child () inherits ({table})",
    "create table {attacker}.f (x int); alter table {attacker}.f add foreign key (x) references {table}",
    "comment on table {table} is 'expired'",
    "copy {table} from program 'true'",
    "copy {table} to '/tmp/nexus'",
    "set row_security = off; select * from {table}",
    "cluster {table}",
    "reindex table {table}",
];

impl<'a> Target<'a> {
    async fn new(stage: &Stage, table: &'a str) -> Self {
        let column = async |which: &str| {
            let query = format!(
                "select min(quote_ident(attname)) from pg_attribute
                 where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped and {which}"
            );
            scalar::<Option<String>>(&stage.test.pool, &query).await
        };
        let has_namespace = column("attname = 'namespace'").await.is_some();
        let any = column("attname <> 'namespace' and attgenerated = '' and attidentity = ''").await;
        Self {
            table,
            has_namespace,
            of_a: match (has_namespace, table) {
                (true, _) => "namespace = 'a'",
                (false, "core.ticks") => "task_id = '{task}'",
                _ => "true",
            },
            any: any.unwrap(),
        }
    }

    /// The statements that fail.
    async fn refused(&self, stage: &Stage) -> Vec<String> {
        let Self {
            table, of_a, any, ..
        } = self;
        let mut refused: Vec<String> = TABLES_REFUSED
            .iter()
            .map(|text| {
                text.replace("{table}", table)
                    .replace("{of_a}", of_a)
                    .replace("{any}", any)
            })
            .collect();
        if *table == "core.role_access" {
            refused.extend([
                "update core.role_access set namespace = 'a'".to_owned(),
                "update core.role_access set access = 'app'".to_owned(),
                "insert into core.role_access values ('{attacker}', 'a', 'app')".to_owned(),
                "insert into core.role_access values ('{attacker}', '*', 'app')".to_owned(),
            ]);
        } else if self.has_namespace {
            refused.push(format!("update {table} set namespace = 'a'"));
            refused.push(format!("update {table} set namespace = 'b'"));
        }
        if table.starts_with("pgmq.") {
            refused.extend([
                format!("insert into {table} (vt, message) values (now(), '{{}}')"),
                format!("update {table} set message = '{{}}'"),
            ]);
        }
        // A row of the victim, as the owner would write it.
        let row: Option<String> = sqlx::query_scalar(sql(&format!(
            "select to_jsonb(t)::text from {table} t where {} limit 1",
            stage.fill(of_a)
        )))
        .fetch_optional(&stage.test.pool)
        .await
        .unwrap();
        let columns: String = scalar(
            &stage.test.pool,
            &format!(
                "select string_agg(quote_ident(attname), ', ') from pg_attribute
                 where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped
                   and attidentity <> 'a' and atttypid <> 'xid8'::regtype"
            ),
        )
        .await;
        refused.extend(row.map(|row| {
            format!(
                "insert into {table} ({columns}) select {columns}
                 from jsonb_populate_record(null::{table}, '{}')",
                row.replace('\'', "''")
            )
        }));
        refused
    }
}

const FUNCTIONS_REFUSED: &[&str] = &[
    "select core.append_event_log('a', 'thing.done', '{}', 'n')",
    "select core.emit('a', 'thing.done', '{}')",
    "select core.emit('a', 'thing.done', '{}', '{\"after\": \"1 hour\"}')",
    "select core.emit('a', 'thing.done', '{}', '{\"idempotencyKey\": \"k\"}')",
    "select core.emit_delayed('a', array[{delayed}])",
    "select * from core.take_delayed('a', array[{delayed}])",
    "select core.ensure_group('a', 'default')",
    "select core.ensure_group('a', 'mine')",
    "select core.ensure_group('A', 'default')",
    "select core.ensure_group('c', 'default')",
    "select core.subscribe('a', 'mine', '[{\"group\": \"default\", \"handler\": \"mine\", \"eventType\": \"thing.done\"}]')",
    "select core.maintain('a')",
    "select core.forget_expired('a')",
    "select core.remove_subscription('a', 'default', 'h')",
    "select core.forget_renames('a', '[{\"group\": \"default\", \"handler\": \"old\"}]')",
    "select core.remove_task('a', 'nightly')",
    "select pgmq.send('core_events_b', '{\"eventType\": \"thing.done\"}', 'epoch'::timestamptz);
     select * from core.adopt('a', 'core_events_b', 10, 1000000)",
    "select * from core.adopt('b', 'core_events_a', 10, 1000000)",
    "select * from core.adopt('a', 'core_events_a', 10, 1000000)",
    "select core.dead_letter('core_events_a', 3, 0, 'r', 'e', 1, '[]')",
    "select core.letters_table('a', 'default')",
    "select core.start_replay('a', 'default', 'h', null, null, null, null, null, null, null)",
    "select * from core.replay_targets('a', 'default', 'h', null)",
    "select core.estimate_replay('a', 'default', 'h', null, null, null, null, null, 1000)",
    "select core.retire('a', 'default', 'h', 'drop')",
    "select core.retire_version('a', 'default', 'h', 1, 'drop', 10)",
    "select core.move_leftovers('core_events_a', array[3::bigint], 'drop', 'x')",
    "select core.give_up_subscription('a', 'default', 'h', 'drop', 1)",
    "select core.pause_group('a', 'default')",
    "select core.resume_group('a', 'default')",
    "select core.set_paused('a', 'default', true)",
    "select core.set_paused('a', 'default', false)",
    "select core.forget_replays('a')",
    "select * from core.dead_letters('a', 'default')",
    "select * from core.plan_redrive('a', 'default', '{}')",
    "select * from core.redrive('a', 'default', '{}')",
    "select core.purge_dead_letters('a', 'default', '{}')",
    "select core.fan_out('[{\"id\": 1, \"queue\": \"core_events_a\", \"handler\": \"h\"}]', 1, 1, '{}')",
    "select core.tune_queue('core_events_a', true)",
    "select core.require_access('read', 'a')",
    "select core.grant_namespace('a', '{attacker}')",
    "select core.grant_namespace('b', '{attacker}')",
    "select core.revoke_namespace('a', '{victim}')",
    "select * from core.create_roles('mine')",
    "select core.bind_role('{attacker}', '*', 'app')",
    "select core.ensure_role('mine')",
    "select core.set_privileges('{attacker}')",
    "select core.set_privileges_on_queue('core_events_a', '{attacker}', 'app')",
    "select core.refresh_roles()",
    "select core.lock_role_access()",
    "select core.isolate('core.nodes', true, true)",
    "select setval('core.event_log_event_id_seq', 1)",
    "select setval('core.node_epochs', 1)",
    "select pgmq.send('core_events_a', '{}')",
    "select pgmq.send_batch('core_events_a', array['{}'::jsonb])",
    "select * from pgmq.read('core_events_a', 0, 10)",
    "select * from pgmq.pop('core_events_a')",
    "select pgmq.delete('core_events_a', 3::bigint)",
    "select pgmq.archive('core_events_a', 3::bigint)",
    "select * from pgmq.set_vt('core_events_a', 3::bigint, 0)",
    "select pgmq.purge_queue('core_events_a')",
    "select pgmq.drop_queue('core_events_a')",
    "select pgmq.drop_queue('core_events_a_dlq')",
    "select * from pgmq.metrics('core_events_a')",
    "select * from pgmq.metrics_all()",
    "select * from pgmq.read('core_events_a_dlq', 0, 10)",
    "select pgmq.create('core_events_c')",
    "select pgmq.create_unlogged('core_events_c')",
    "delete from pgmq.meta",
    "insert into pgmq.meta (queue_name, is_partitioned, is_unlogged) values ('mine', false, false)",
    "select pgmq.enable_notify_insert('core_events_a')",
    "select pgmq.bind_topic('#', 'core_events_a')",
    "select pgmq.send_topic('x', '{}')",
    "select pgmq.convert_archive_partitioned('core_events_a')",
];

const FUNCTIONS_BLIND: &[&str] = &[
    "select * from core.plan_fan_out('a', 'thing.done')",
    "select core.cancel({delayed})",
    "select core.newest_event('a', array['thing.done'])",
    "select core.cancel_replay('a', '{replay}')",
    "select core.cancel_replay('b', '{replay}')",
    "select sent from core.drive_replay('{replay}', 10)",
    "select core.move_retired({retired}, 10)",
    "select * from core.dead_letter_summary('a')",
    "select * from core.letter_targets('a', 'default')",
    "select core.is_run('a', 'default', 'h', '1')",
    "select core.settle_subscriptions('a')",
    "select emitted, queues, failed from core.emit_due('a', 10, false)",
    "select emitted, queues, failed from core.emit_due('a', 10, true)",
    "select core.caller_may('app', 'a')",
    "select core.caller_may('read', 'a')",
    "select core.sync_cron_jobs('a', null)",
    "select * from core.queue_metrics where queue_name ~ 'core_events_a'",
    "select * from core.cron_job where jobname ~ '^a_'",
    "select * from core.cron_job_run_details d where d.command ~ '{task}'",
    "select * from pg_stats where schemaname = 'core' and 'a' = any (most_common_vals::text::text[])",
    "select * from pg_stats where schemaname = 'pgmq' and tablename ~ 'core_events_a'",
    "select * from pg_stat_activity where usename <> '{attacker}' and query ~ 'core'",
    "select * from core.event_log where payload ->> 'secret' = 'a'",
    "select * from core.event_log where event_id = {event}",
    "select * from core.role_access where namespace <> 'b'",
];

const FUNCTIONS_HARMLESS: &[&str] = &[
    "select core.assign_versions('a')",
    "select core.fire_ticks('a', array['{task}'::uuid], array[now()], true)",
    "select core.fire_tick('{task}', now(), now())",
    "select core.fire_due('{task}')",
    "select core.run_task_now('{task}')",
    "select core.run_scheduled_task('{task}')",
    "select core.touch_node_heartbeat('a-1')",
    "select core.remove_node('a-1', {epoch})",
    "select core.free_node_id('a-1', 'b')",
    "select core.lock_registrations('a')",
    "begin; select core.lock_registrations('a'); commit",
    "select core.ensure_partitions(100000)",
    "select core.expired_partitions('0')",
    "notify nexus_a, 'core_events_a'",
    "select pg_notify('nexus_a', n::text) from generate_series(1, 1000) n",
    "listen nexus_a",
    "select nextval('core.event_log_event_id_seq') from generate_series(1, 1000)",
    "select core.cancel(n) from generate_series(1, 100) n",
    "update core.subscriptions set handler = 'mine'",
    "update core.scheduled_tasks set name = 'mine', event_type = 'thing.done'",
    "update core.namespaces set subscriptions_version = subscriptions_version + 1",
    "update core.nodes set last_heartbeat = 'epoch'",
];

#[tokio::test]
async fn no_function_reaches_into_another_namespace() {
    let stage = Stage::new().await;
    stage.all_blind(FUNCTIONS_BLIND).await;
    stage.all_refused(FUNCTIONS_REFUSED).await;
    stage.all_harmless(FUNCTIONS_HARMLESS).await;

    // Every function that is told a namespace, a queue, or an id, is among them.
    let functions = texts(
        &stage.test.pool,
        "select distinct proname::text from pg_proc
         where pronamespace = 'core'::regnamespace and provolatile <> 'i' and proname !~ '^test_'
           and prorettype <> 'trigger'::regtype
           and proargnames && '{p_namespace,p_queue,p_event_id,p_event_ids,p_task_id,p_node_id,p_targets,p_role,p_replay_id,p_subscription_id}'
         order by 1",
    )
    .await;
    let tried = [FUNCTIONS_REFUSED, FUNCTIONS_BLIND, FUNCTIONS_HARMLESS].concat();
    // It makes an envelope of what it is told.
    let made_up = ["envelope", "logged_envelope"];
    for function in functions {
        assert!(
            made_up.contains(&function.as_str())
                || tried
                    .iter()
                    .any(|text| text.contains(&format!("core.{function}("))),
            "nobody tries core.{function} on another namespace"
        );
    }
    stage.test.end().await;
}

#[tokio::test]
async fn no_other_role_can_be_taken() {
    let stage = Stage::new().await;
    stage
        .all_refused(&[
            "set session authorization {owner}",
            "set session authorization {victim}",
            "set role {owner}",
            "set role {victim}",
            "grant {owner} to {attacker}",
            "grant {victim} to {attacker}",
            "alter role {attacker} superuser",
            "alter role {attacker} bypassrls",
            "alter role {victim} password 'mine'",
            "drop role {victim}",
            "drop owned by {victim}",
            "reassign owned by {victim} to {attacker}",
            "create role mine",
            "alter schema core owner to {attacker}",
            "drop schema core cascade",
            "create table core.mine (x int)",
            "create function core.mine() returns int language sql as 'select 1'",
            "create or replace function core.now() returns timestamptz language sql as 'select now()'",
            "create table pgmq.q_core_events_mine (x int)",
            "create extension file_fdw",
            "create publication p for table core.event_log",
            "create event trigger e on ddl_command_start execute function core.reschedule()",
            "alter function core.ensure_group(text, text) owner to {attacker}",
            "alter function core.ensure_group(text, text) reset search_path",
            "alter function core.ensure_group(text, text) security invoker",
            "alter default privileges for role {owner} grant select on tables to {attacker}",
            "set session_replication_role = replica",
            "select pg_read_file('postgresql.conf')",
            "create function {attacker}.f() returns int language sql set role = '{victim}' as 'select 1'; select {attacker}.f()",
        ])
        .await;
    // The victim's session cannot be ended either.
    let victim = stage.fill("{victim}");
    let mut session = stage.test.connect_as(&victim).await;
    let pid: i32 = scalar(&mut session, "select pg_backend_pid()").await;
    for end in ["terminate", "cancel"] {
        let statement = format!("select pg_{end}_backend({pid})");
        stage.all_refused(&[&statement]).await;
    }
    execute(&mut session, "select 1").await;
    let _ = session.close().await;
    stage.test.end().await;
}

/// What is called like a function or operator that the schema uses, and says who ran it.
const TRAPS: &str = "
    create table {attacker}.trap (what text, who text);
    grant all on {attacker}.trap to public;
    grant usage on schema {attacker} to public;
    create function {attacker}.spring(what text) returns void language plpgsql as $$
    begin insert into {attacker}.trap values (what, current_user); end $$;
    create function {attacker}.format(text, variadic text[]) returns text language plpgsql as $$
    begin perform {attacker}.spring('format'); return 'select 1'; end $$;
    create function {attacker}.hashtext(text) returns integer language plpgsql as $$
    begin perform {attacker}.spring('hashtext'); return 1; end $$;
    create function {attacker}.to_regclass(text) returns regclass language plpgsql as $$
    begin perform {attacker}.spring('to_regclass'); return null; end $$;
    create function {attacker}.pg_has_role(name, oid, text) returns boolean language plpgsql as $$
    begin perform {attacker}.spring('pg_has_role'); return true; end $$;
    create function {attacker}.pg_has_role(oid, text) returns boolean language plpgsql as $$
    begin perform {attacker}.spring('pg_has_role'); return true; end $$;
    create function {attacker}.current_setting(text) returns text language plpgsql as $$
    begin perform {attacker}.spring('current_setting'); return '{owner}'; end $$;
    create function {attacker}.same(text, text) returns boolean language plpgsql as $$
    begin perform {attacker}.spring('='); return true; end $$;
    create operator {attacker}.= (leftarg = text, rightarg = text, function = {attacker}.same);
    create function {attacker}.joined(text, text) returns text language plpgsql as $$
    begin perform {attacker}.spring('||'); return '{}'; end $$;
    create operator {attacker}.|| (leftarg = text, rightarg = text, function = {attacker}.joined);
    create function {attacker}.leak(text) returns boolean language plpgsql cost 0.0000001 as $$
    begin insert into {attacker}.trap values ($1, current_user); return true; end $$;
    create view {attacker}.log as select * from core.event_log;
    create view {attacker}.invoked with (security_invoker) as select * from core.event_log;";

#[tokio::test]
async fn what_runs_as_the_owner_falls_into_no_trap() {
    let stage = Stage::new().await;
    let before = state(&stage.test.pool, "a").await;
    let mut attacker = stage.test.connect_as(&stage.attacker).await;
    execute(&mut attacker, &stage.fill(TRAPS)).await;
    execute(
        &mut attacker,
        "create temp table queue_part (x int);
         create function pg_temp.queue_part(text) returns text language sql as 'select ''a''::text'",
    )
    .await;
    for path in [
        "{attacker}, pg_catalog",
        "{attacker}, core, pgmq, pg_catalog",
        "pg_temp, {attacker}, pg_catalog",
    ] {
        let set = stage.fill(&format!("set search_path = {path}"));
        execute(&mut attacker, &set).await;
        for statement in [
            "select core.ensure_group('b', 'trapped' || length(pg_catalog.current_setting('search_path')))",
            "select core.ensure_partitions()",
            "select core.maintain('b')",
            "select core.cancel(1)",
            "select core.emit('b', 'thing.done', '{}', '{\"after\": \"1 hour\"}')",
            "select core.remove_node('b-0', 1)",
            "select core.remove_task('b', 'none')",
            "select core.emit_due('b', 10, true)",
        ] {
            execute(&mut attacker, statement).await;
        }
        refused(&mut attacker, "select core.ensure_group('a', 'default')").await;
    }
    execute(&mut attacker, "reset search_path").await;
    for statement in [
        "select count(*) from core.event_log where {attacker}.leak(payload::text)",
        "select count(*) from core.event_log where {attacker}.leak(payload::text) and namespace = 'a'",
        "select count(*) from {attacker}.log where {attacker}.leak(payload::text)",
        "select count(*) from {attacker}.invoked where {attacker}.leak(payload::text)",
        "select count(*) from core.delayed_emits where {attacker}.leak(payload::text)",
        "select count(*) from core.scheduled_tasks where {attacker}.leak(payload::text)",
        "select count(*) from core.ticks where {attacker}.leak(task_id::text)",
    ] {
        let rows = sqlx::raw_sql(sql(&stage.fill(statement)))
            .fetch_one(&mut attacker)
            .await
            .unwrap();
        if statement.contains("namespace = 'a'") {
            assert_eq!(rows.get::<i64, _>(0), 0, "{statement}");
        }
    }
    let trapped = texts(
        &stage.test.pool,
        &stage.fill(
            "select format('%s by %s', what, who) from {attacker}.trap
             where who <> '{attacker}' or what ~ '\"secret\": \"a\"' or what = '{task}'",
        ),
    )
    .await;
    assert!(trapped.is_empty(), "{trapped:?}");
    let own: i64 = scalar(
        &stage.test.pool,
        &stage.fill("select count(*) from {attacker}.trap"),
    )
    .await;
    assert!(own > 0, "the trap works");
    stage.unchanged(&before, &["the traps"]).await;
    let _ = attacker.close().await;
    stage.test.end().await;
}

/// Numbers are drawn from sequences, so the next ones are known.
#[tokio::test]
async fn ids_that_are_known_take_nothing_from_others() {
    let stage = Stage::new().await;
    let pool = &stage.test.pool;
    let mut attacker = stage.test.connect_as(&stage.attacker).await;
    // The victim's own event, under another name; and all those that come next.
    for statement in [
        "insert into core.delayed_emits
             (event_id, namespace, event_type, payload, due_at, next_try_at, producer_node_id, correlation_id)
         select n, 'b', 'thing.done', '{\"secret\": \"forged\"}', now(), now(), 'n', 'n'
         from generate_series({delayed}, {delayed} + 200) n on conflict do nothing",
        "insert into core.event_log
             (event_id, namespace, event_type, payload, producer_node_id, subscriptions_version)
         select n, 'b', 'thing.done', '{\"secret\": \"forged\"}', 'n', 1000000
         from generate_series(1, {delayed} + 200) n",
    ] {
        execute(&mut attacker, &stage.fill(statement)).await;
    }
    for statement in [
        "insert into core.subscriptions
             (subscription_id, namespace, group_name, handler, event_type, app, queue_name, since_version, since_at)
         overriding system value
         select n, 'b', 'default', 'h' || n, 'thing.done', 'mine', 'core_events_b', 1, now() from generate_series(5, 50) n",
        "insert into core.subscriptions
             (namespace, group_name, handler, event_type, app, queue_name, since_version, since_at)
         values ('b', 'default', 'x', 'thing.done', 'mine', 'core_events_a', 1, now())",
        "insert into core.subscriptions
             (namespace, group_name, handler, event_type, app, queue_name, since_version, since_at)
         values ('b', 'x''; drop schema core cascade; --', 'x', 'thing.done', 'mine', 'core_events_b', 1, now())",
        "update core.subscriptions set queue_name = 'core_events_a'",
        "insert into core.retirements
             (subscription_id, namespace, group_name, handler, names, event_type, queue_name, fate, version)
         select n, 'b', 'default', 'h', '{}', 'thing.done', 'core_events_b', 'drop', 1 from generate_series(1, 50) n",
        "update core.retirements set queue_name = 'core_events_a'",
        "update core.replays set queue_name = 'core_events_a'",
        "insert into core.nodes (node_id, namespace) values ('a-1', 'b')",
        "insert into core.nodes (node_id, namespace) values ('a-1', 'b')
         on conflict (node_id) do update set last_heartbeat = 'epoch'",
        "insert into core.event_log (namespace, event_type, payload, producer_node_id, tx_id)
         values ('b', 'thing.done', '{}', 'n', '1')",
    ] {
        refused(&mut attacker, &stage.fill(statement)).await;
    }
    // A replay of its own, to all handlers that there are.
    execute(
        &mut attacker,
        "insert into core.replays
             (replay_id, namespace, group_name, subscription_ids, queue_name, snapshot, last_at, position_at)
         values ('00000000-0000-0000-0000-00000000000b', 'b', 'default', '{1,2,3,4,5,6,7,8,9}', 'core_events_b',
                 pg_current_snapshot(), now() + interval '1 hour', '-infinity')",
    )
    .await;
    let _ = attacker.close().await;
    execute(
        pool,
        "select core.drive_replay('00000000-0000-0000-0000-00000000000b', 1000)",
    )
    .await;
    let theirs: i64 = scalar(
        pool,
        "select count(*) from pgmq.q_core_events_b q
         join core.subscriptions s on s.subscription_id = (q.headers ->> 'subscription')::bigint
         where s.namespace <> 'b'",
    )
    .await;
    assert_eq!(theirs, 0, "it is told of no handler of the victim's");

    // Emitted by the owner, as by a node that runs as the owner: what the victim asked for, once.
    execute(
        pool,
        "select core.emit('a', 'thing.done', '{\"secret\": \"later\"}', '{\"after\": \"1 hour\"}');
         update core.delayed_emits set next_try_at = 'epoch' where namespace = 'a'",
    )
    .await;
    let queued = "select coalesce(message -> 'payload' ->> 'secret', '') from pgmq.q_core_events_a order by msg_id";
    let before = texts(pool, queued).await.len();
    execute(pool, "select * from core.emit_due('a', 100, false)").await;
    let mut after = texts(pool, queued).await.split_off(before);
    after.sort();
    assert_eq!(after, ["a", "later"]);
    let left: i64 = scalar(
        pool,
        "select count(*) from core.delayed_emits where namespace = 'b' and payload ->> 'secret' = 'forged'",
    )
    .await;
    assert_eq!(left, 200, "what the attacker has stored is its own");
    stage.test.end().await;
}

/// A bound role that is a member of another one, or was changed to it, has the rights of that one only.
#[tokio::test]
async fn rights_are_those_of_the_role_in_force() {
    let test = Test::new().await;
    let a = test.tenant("a", "app").await;
    let b = test.tenant("b", "app").await;
    let (heir, guest) = (test.role("heir").await, test.role("guest").await);
    execute(
        &test.pool,
        &format!("alter role {guest} noinherit; grant {a} to {heir}; grant {a}, {b} to {guest}"),
    )
    .await;
    let emit = "select core.emit('a', 'thing.done', '{}')";
    let group = "select core.ensure_group('a', 'default')";
    let mut heir_session = test.connect_as(&heir).await;
    execute(&mut heir_session, emit).await;
    execute(&mut heir_session, group).await;
    refused(
        &mut heir_session,
        "select core.emit('b', 'thing.done', '{}')",
    )
    .await;
    refused(
        &mut heir_session,
        "select core.ensure_group('b', 'default')",
    )
    .await;

    let mut guest_session = test.connect_as(&guest).await;
    refused(&mut guest_session, emit).await;
    execute(&mut guest_session, &format!("set role {a}")).await;
    execute(&mut guest_session, emit).await;
    execute(&mut guest_session, group).await;
    execute(&mut guest_session, &format!("set role {b}")).await;
    refused(&mut guest_session, emit).await;
    refused(&mut guest_session, group).await;

    // A session of the owner's that gives up its rights has none.
    let mut reduced = PgConnection::connect(test.database.url()).await.unwrap();
    execute(
        &mut reduced,
        &format!("grant {b} to current_user; set role {b}"),
    )
    .await;
    refused(&mut reduced, group).await;
    refused(&mut reduced, emit).await;

    // What was taken back is gone at once, also for sessions that are open.
    execute(
        &test.pool,
        &format!("select core.revoke_namespace('a', '{a}')"),
    )
    .await;
    refused(&mut heir_session, emit).await;
    refused(&mut heir_session, group).await;
    for session in [heir_session, guest_session, reduced] {
        let _ = session.close().await;
    }
    test.end().await;
}

/// One role may read in a namespace and work in another: together they are no more than that.
#[tokio::test]
async fn reading_in_one_namespace_and_working_in_another_do_not_add_up() {
    let test = Test::new().await;
    let role = test.tenant("b", "app").await;
    furnish(&test.pool, "a").await;
    execute(
        &test.pool,
        &format!("select core.grant_namespace('a', '{role}', 'read')"),
    )
    .await;
    let before = state(&test.pool, "a").await;
    let mut session = test.connect_as(&role).await;
    let seen: i64 = scalar(
        &mut session,
        "select count(*) from core.event_log where namespace = 'a'",
    )
    .await;
    assert_eq!(seen, 4);
    let seen: i64 = scalar(&mut session, "select count(*) from pgmq.q_core_events_a").await;
    assert!(seen > 0);
    execute(
        &mut session,
        "select core.ensure_group('a', 'default'); select * from core.queue_metrics",
    )
    .await;
    for statement in [
        "select core.emit('a', 'thing.done', '{}')",
        "select core.ensure_group('a', 'new')",
        "select core.maintain('a')",
        "select pgmq.send('core_events_a', '{}')",
        "delete from pgmq.q_core_events_a",
        "select core.remove_task('a', 'nightly')",
        "insert into core.ticks (task_id, due_at, event_id) select task_id, now(), 1 from core.scheduled_tasks where namespace = 'a'",
    ] {
        refused(&mut session, statement).await;
    }
    execute(&mut session, "update core.scheduled_tasks set active = false; select core.cancel(event_id) from core.delayed_emits").await;
    assert_eq!(state(&test.pool, "a").await, before);
    let _ = session.close().await;
    test.end().await;
}
