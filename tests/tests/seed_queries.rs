//! Whoever knows the original system finds what its documentation prints: every query runs as
//! printed and answers what it says, every column has its name and type, every function its
//! signature. Where the original cannot work (pgmq keeps no depths in `pgmq.meta`, `pg_cron` is not
//! installed) one name in the query is another, and the columns stay.

use std::time::Duration;

use nexus::{prelude::*, testing::TestDatabase};
use nexus_tests::within;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool, SqlSafeStr};

/// A query as it is printed: sent as it stands, then again for its rows.
async fn run(pool: &PgPool, query: &str) -> Vec<Value> {
    let text = AssertSqlSafe(query.to_owned()).into_sql_str();
    sqlx::raw_sql(text)
        .execute(pool)
        .await
        .unwrap_or_else(|error| panic!("{query}: {error}"));
    let inner = query.trim().trim_end_matches(';');
    let text = AssertSqlSafe(format!("select to_jsonb(q) from ({inner}) q")).into_sql_str();
    sqlx::query_scalar(text).fetch_all(pool).await.unwrap()
}

async fn execute(pool: &PgPool, statement: &'static str) {
    sqlx::raw_sql(statement).execute(pool).await.unwrap();
}

/// A namespace `myapp` with a node and its queues, and nobody who takes messages out of them.
async fn myapp() -> (TestDatabase, PgPool) {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    execute(
        &pool,
        "select core.ensure_group('myapp', 'default');
         insert into core.nodes (node_id, namespace, display_name) values
             ('my-node-1', 'myapp', 'api'), ('my-node-2', 'myapp', 'gone');
         update core.nodes set last_heartbeat = now() - interval '1 hour' where node_id = 'my-node-2'",
    )
    .await;
    (database, pool)
}

#[tokio::test]
async fn namespaces_and_nodes() {
    let (_database, pool) = myapp().await;
    let rows = run(&pool, "SELECT * FROM core.namespaces;").await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["namespace"], "myapp");
    assert_eq!(rows[0]["metadata"], json!({}));

    let rows = run(
        &pool,
        "SELECT
           node_id,
           display_name,
           namespace,
           last_heartbeat,
           now() - last_heartbeat AS time_since_heartbeat
         FROM core.nodes
         WHERE namespace = 'myapp';",
    )
    .await;
    assert_eq!(rows.len(), 2);
    let active = "SELECT
           node_id,
           display_name,
           last_heartbeat,
           now() - last_heartbeat AS time_since_heartbeat
         FROM core.nodes
         WHERE namespace = 'myapp'
           AND last_heartbeat > now() - interval '5 minutes'
         ORDER BY last_heartbeat DESC;";
    let rows = run(&pool, active).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["node_id"], &rows[0]["display_name"]),
        (&json!("my-node-1"), &json!("api"))
    );

    // The heartbeat brings the other one back.
    execute(&pool, "SELECT core.touch_node_heartbeat('my-node-2');").await;
    let rows = run(&pool, active).await;
    assert_eq!(
        rows[0]["node_id"], "my-node-2",
        "the newest heartbeat comes first"
    );
    assert_eq!(rows.len(), 2);
    execute(&pool, "SELECT core.touch_node_heartbeat('my-node-1');").await;
    assert_eq!(run(&pool, active).await[0]["node_id"], "my-node-1");
    execute(&pool, "SELECT core.touch_node_heartbeat('nobody');").await;
}

#[tokio::test]
async fn the_event_log() {
    let (_database, pool) = myapp().await;
    let append = "SELECT core.append_event_log(
           'myapp',
           'user.created',
           '{\"userId\": \"123\"}'::jsonb,
           'node-1',
           NULL,
           '{\"messageId\": 1}'::jsonb
         );";
    let ids = run(&pool, append).await;
    // Sent twice by `run`, and the id is what it returns.
    let id = ids[0]["append_event_log"].as_i64().unwrap();
    execute(
        &pool,
        "select core.emit('myapp', 'user.deleted', '{}'), core.emit('myapp', 'user.deleted', '{}'),
                           core.emit('myapp', 'user.deleted', '{}')",
    )
    .await;

    let rows = run(
        &pool,
        "SELECT
           event_id,
           event_type,
           producer_node_id,
           emitted_at,
           payload
         FROM core.event_log
         WHERE namespace = 'myapp'
           AND event_type = 'user.created'
         ORDER BY emitted_at DESC
         LIMIT 100;",
    )
    .await;
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["event_id"], id);
    assert_eq!(rows[0]["producer_node_id"], "node-1");
    assert_eq!(rows[0]["payload"], json!({"userId": "123"}));
    let metadata = run(
        &pool,
        "select metadata from core.event_log where event_type = 'user.created'",
    )
    .await;
    assert_eq!(metadata[0]["metadata"], json!({"messageId": 1}));

    let rows = run(
        &pool,
        "SELECT
           event_type,
           COUNT(*) AS count,
           MIN(emitted_at) AS first_event,
           MAX(emitted_at) AS last_event
         FROM core.event_log
         WHERE namespace = 'myapp'
           AND emitted_at > now() - interval '24 hours'
         GROUP BY event_type
         ORDER BY count DESC;",
    )
    .await;
    let counts: Vec<_> = rows
        .iter()
        .map(|row| (&row["event_type"], &row["count"]))
        .collect();
    assert_eq!(
        counts,
        [
            (&json!("user.deleted"), &json!(3)),
            (&json!("user.created"), &json!(2))
        ]
    );
    assert!(rows[0]["first_event"].as_str() <= rows[0]["last_event"].as_str());
}

#[tokio::test]
async fn partitions() {
    let (_database, pool) = myapp().await;
    let rows = run(
        &pool,
        "SELECT
           schemaname,
           tablename,
           tableowner
         FROM pg_tables
         WHERE tablename LIKE 'event_log%';",
    )
    .await;
    assert_eq!(rows.len(), 1 + 13, "the log, this month and twelve ahead");
    assert!(
        rows.iter()
            .all(|row| row["schemaname"] == "core" && row["tableowner"].is_string())
    );
}

#[tokio::test]
async fn names_of_queues() {
    let (_database, pool) = myapp().await;
    let rows = run(&pool, "SELECT core.queue_name_for_namespace('myapp');").await;
    assert_eq!(rows[0]["queue_name_for_namespace"], "core_events_myapp");
    let rows = run(
        &pool,
        "SELECT core.dead_letter_queue_name_for_namespace('myapp');",
    )
    .await;
    assert_eq!(
        rows[0]["dead_letter_queue_name_for_namespace"],
        "core_events_myapp_dlq"
    );
    let rows = run(&pool, "select queue_name from pgmq.meta order by 1").await;
    assert_eq!(
        rows,
        [
            json!({"queue_name": "core_events_myapp"}),
            json!({"queue_name": "core_events_myapp_dlq"}),
        ]
    );
}

#[tokio::test]
async fn queue_operations_and_metrics() {
    let (_database, pool) = myapp().await;
    let send = r#"SELECT pgmq.send('core_events_myapp', '{"key": "value"}'::jsonb);"#;
    run(&pool, send).await;
    let rows = run(
        &pool,
        "SELECT * FROM pgmq.read('core_events_myapp', 0, 10);",
    )
    .await;
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["message"], json!({"key": "value"}));
    let id = rows[1]["msg_id"].as_i64().unwrap();

    // pgmq.meta has no such columns; core.queue_metrics has, under the names of the original.
    let depth = "SELECT queue_length
         FROM pgmq.meta
         WHERE queue_name = 'core_events_myapp';"
        .replace("pgmq.meta", "core.queue_metrics");
    assert_eq!(run(&pool, &depth).await, [json!({"queue_length": 2})]);
    let metrics = "SELECT
           queue_name,
           queue_length,
           newest_msg_age_seconds,
           oldest_msg_age_seconds
         FROM pgmq.meta
         WHERE queue_name LIKE 'core_events_%';"
        .replace("pgmq.meta", "core.queue_metrics");
    let rows = run(&pool, &metrics).await;
    let of = |name: &str| rows.iter().find(|row| row["queue_name"] == name).unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(of("core_events_myapp")["queue_length"], 2);
    assert!(of("core_events_myapp")["oldest_msg_age_seconds"].as_i64() >= Some(0));
    assert_eq!(of("core_events_myapp_dlq")["queue_length"], 0);
    assert_eq!(
        of("core_events_myapp_dlq")["newest_msg_age_seconds"],
        Value::Null
    );

    let rows = run(&pool, "SELECT pgmq.delete('core_events_myapp', 123);").await;
    assert_eq!(rows[0]["delete"], false, "there is no message 123");
    let rows = run(
        &pool,
        &format!("SELECT pgmq.delete('core_events_myapp', {id});"),
    )
    .await;
    assert_eq!(
        rows[0]["delete"], false,
        "`run` has deleted it the first time"
    );
    assert_eq!(run(&pool, &depth).await, [json!({"queue_length": 1})]);
}

/// The task of the original's README.
async fn schedule_cleanup(pool: &PgPool) {
    execute(
        pool,
        "insert into core.scheduled_tasks (task_id, namespace, name, cron_expression, event_type, payload)
         values ('123e4567-e89b-12d3-a456-426614174000', 'myapp', 'cleanup', '*/5 * * * *',
                 'maintenance.cleanup', '{\"limit\": 100}'),
                ('123e4567-e89b-12d3-a456-426614174001', 'myapp', 'retired', '0 0 * * *', 'old.report', '{}');
         update core.scheduled_tasks set active = false where name = 'retired';
         select core.subscribe('myapp', 'default',
             '[{\"group\": \"default\", \"handler\": \"clean\", \"eventType\": \"maintenance.cleanup\"}]')",
    )
    .await;
}

#[tokio::test]
async fn scheduled_tasks_and_running_one() {
    let (_database, pool) = myapp().await;
    schedule_cleanup(&pool).await;
    let tasks = "SELECT
           name,
           cron_expression,
           event_type,
           active,
           updated_at
         FROM core.scheduled_tasks
         WHERE namespace = 'myapp';";
    let before = run(&pool, tasks).await;
    assert_eq!(before.len(), 2);
    let cleanup = |rows: &[Value]| {
        rows.iter()
            .find(|row| row["name"] == "cleanup")
            .unwrap()
            .clone()
    };
    assert_eq!(cleanup(&before)["cron_expression"], "*/5 * * * *");
    assert_eq!(cleanup(&before)["active"], true);

    execute(
        &pool,
        "SELECT core.run_scheduled_task('123e4567-e89b-12d3-a456-426614174000');",
    )
    .await;
    assert!(
        cleanup(&run(&pool, tasks).await)["updated_at"].as_str()
            > cleanup(&before)["updated_at"].as_str(),
        "the run is noted in updated_at"
    );
    let logged = run(&pool, "select * from core.event_log").await;
    assert_eq!(logged.len(), 1);
    assert_eq!(logged[0]["event_type"], "maintenance.cleanup");
    assert_eq!(logged[0]["payload"], json!({"limit": 100}));
    assert_eq!(
        logged[0]["scheduled_task_id"],
        "123e4567-e89b-12d3-a456-426614174000"
    );
    assert!(logged[0]["metadata"]["jobId"].is_i64(), "{logged:?}");
    let queued = run(&pool, "select message from pgmq.q_core_events_myapp").await;
    let message = &queued[0]["message"];
    assert_eq!(message["producerNodeId"], "scheduler");
    assert_eq!(message["payload"], json!({"limit": 100}));
    assert_eq!(
        message["scheduledTaskId"],
        "123e4567-e89b-12d3-a456-426614174000"
    );

    // One that is not active, one that does not exist, none at all: a notice, no event.
    execute(
        &pool,
        "SELECT core.run_scheduled_task('123e4567-e89b-12d3-a456-426614174001');
         SELECT core.run_scheduled_task('123e4567-e89b-12d3-a456-426614174009');
         SELECT core.run_scheduled_task(NULL)",
    )
    .await;
    assert_eq!(run(&pool, "select from core.event_log").await.len(), 1);
}

#[tokio::test]
async fn cron_jobs_and_their_runs() {
    let (_database, pool) = myapp().await;
    schedule_cleanup(&pool).await;
    for _ in 0..2 {
        execute(
            &pool,
            "SELECT core.run_scheduled_task('123e4567-e89b-12d3-a456-426614174000');",
        )
        .await;
    }
    // The tables are pg_cron's; core.cron_job and core.cron_job_run_details have their columns.
    let jobs = "SELECT
           jobid,
           schedule,
           command,
           nodename,
           nodeport,
           database,
           username,
           active
         FROM cron.job
         WHERE jobname LIKE '%myapp%';"
        .replace("cron.job", "core.cron_job");
    let rows = run(&pool, &jobs).await;
    assert_eq!(rows.len(), 2);
    let job = rows.iter().find(|row| row["active"] == true).unwrap();
    assert_eq!(job["schedule"], "*/5 * * * *");
    assert_eq!(
        job["command"],
        "select core.run_scheduled_task('123e4567-e89b-12d3-a456-426614174000')"
    );
    assert!(job["jobid"].is_i64() && job["nodeport"].is_i64(), "{job}");
    let runs = "SELECT
           j.jobname,
           jr.runid,
           jr.status,
           jr.return_message,
           jr.start_time,
           jr.end_time
         FROM cron.job j
         JOIN cron.job_run_details jr ON j.jobid = jr.jobid
         WHERE j.jobname LIKE '%myapp%'
         ORDER BY jr.start_time DESC
         LIMIT 50;"
        .replace("cron.job", "core.cron_job");
    let rows = run(&pool, &runs).await;
    assert_eq!(
        rows.len(),
        2,
        "one row a run, none for the task that never ran"
    );
    assert_eq!(
        rows[0]["jobname"],
        "myapp_cleanup_123e4567_e89b_12d3_a456_426614174000"
    );
    assert_eq!(rows[0]["status"], "succeeded");
    assert!(
        rows[0]["start_time"].as_str() > rows[1]["start_time"].as_str(),
        "newest first"
    );
    let newest = run(&pool, "select max(event_id) from core.event_log").await;
    assert_eq!(rows[0]["runid"], newest[0]["max"]);

    // The command of a job is the statement that runs it.
    run(&pool, job["command"].as_str().unwrap()).await;
    assert_eq!(run(&pool, &runs).await.len(), 4);
}

/// The event of the original's README.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "demo.event")]
struct DemoEvent {
    hello: String,
}

/// The handler of the original's README.
#[handler]
async fn acknowledge(event: Envelope<DemoEvent>, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into acknowledgements(node_id, msg_id) values ($1, $2)")
        .bind(event.meta().producer_node_id())
        .bind(event.meta().message_id())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[tokio::test]
async fn the_example_of_the_readme() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    execute(
        &pool,
        "create table acknowledgements (node_id text, msg_id bigint)",
    )
    .await;
    let app = App::discover()
        .namespace("demo")
        .display_name("api")
        .metadata(json!({"role": "producer"}))
        .node_id("api-1")
        .idle_poll(Duration::from_millis(25))
        .database_url(database.url());
    let app = nexus::start(app).await.unwrap();
    app.client()
        .emit(&DemoEvent {
            hello: "world".to_owned(),
        })
        .await
        .unwrap();
    within("the event is handled", app.idle()).await.unwrap();
    let rows = run(&pool, "select * from acknowledgements").await;
    assert_eq!(rows, [json!({"node_id": "api-1", "msg_id": 1})]);
    let rows = run(
        &pool,
        "select node_id, display_name, description, metadata from core.nodes",
    )
    .await;
    assert_eq!(
        rows,
        [json!({
            "node_id": "api-1", "display_name": "api", "description": null, "metadata": {"role": "producer"},
        })]
    );
    app.shutdown().await;
}

#[tokio::test]
async fn columns_have_their_names_and_types() {
    let (_database, pool) = myapp().await;
    let expected = json!({
        "namespaces": {"namespace": "text", "created_at": "timestamptz", "metadata": "jsonb"},
        "nodes": {
            "node_id": "text", "namespace": "text", "display_name": "text", "description": "text",
            "metadata": "jsonb", "registered_at": "timestamptz", "last_heartbeat": "timestamptz",
        },
        "event_log": {
            "event_id": "int8", "namespace": "text", "event_type": "text", "payload": "jsonb",
            "emitted_at": "timestamptz", "producer_node_id": "text", "scheduled_task_id": "uuid",
            "metadata": "jsonb",
        },
        "scheduled_tasks": {
            // An integer in the original; pg_cron's own column is a bigint, as here.
            "task_id": "uuid", "namespace": "text", "job_id": "int8", "name": "text",
            "cron_expression": "text", "event_type": "text", "payload": "jsonb", "timezone": "text",
            "active": "bool", "created_at": "timestamptz", "updated_at": "timestamptz",
        },
    });
    for (table, columns) in expected.as_object().unwrap() {
        let found = run(
            &pool,
            &format!(
                "select jsonb_object_agg(column_name, udt_name) as columns from information_schema.columns
                 where table_schema = 'core' and table_name = '{table}'"
            ),
        )
        .await;
        for (column, data_type) in columns.as_object().unwrap() {
            assert_eq!(
                &found[0]["columns"][column], data_type,
                "core.{table}.{column}"
            );
        }
    }
}

#[tokio::test]
async fn keys_references_and_indexes_are_there() {
    let (_database, pool) = myapp().await;
    let constraints = run(
        &pool,
        "select conrelid::regclass || ': ' || pg_get_constraintdef(oid) as is
         from pg_constraint where connamespace = 'core'::regnamespace",
    )
    .await;
    for constraint in [
        "core.namespaces: PRIMARY KEY (namespace)",
        "core.nodes: PRIMARY KEY (node_id)",
        "core.nodes: UNIQUE (namespace, node_id)",
        "core.nodes: FOREIGN KEY (namespace) REFERENCES core.namespaces(namespace)",
        // A partitioned table's key must hold what it is partitioned by.
        "core.event_log: PRIMARY KEY (event_id, emitted_at)",
        "core.scheduled_tasks: PRIMARY KEY (task_id)",
        "core.scheduled_tasks: FOREIGN KEY (namespace) REFERENCES core.namespaces(namespace)",
    ] {
        assert!(
            constraints.contains(&json!({"is": constraint})),
            "{constraint}: {constraints:#?}"
        );
    }
    let indexes = run(
        &pool,
        "select tablename || ' ' || regexp_replace(indexdef, '.* USING ', '') as is
         from pg_indexes where schemaname = 'core'",
    )
    .await;
    for index in [
        "nodes btree (namespace)",
        "scheduled_tasks btree (namespace)",
        // One index for namespace and event type; with the time, as every query wants them.
        "event_log btree (namespace, event_type, emitted_at)",
        "event_log brin (emitted_at)",
    ] {
        assert!(
            indexes.contains(&json!({"is": index})),
            "{index}: {indexes:#?}"
        );
    }
}

#[tokio::test]
async fn functions_have_their_signatures() {
    let (_database, pool) = myapp().await;
    let found = run(
        &pool,
        "select format('%s(%s) returns %s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid)) as is
         from pg_proc where pronamespace = 'core'::regnamespace",
    )
    .await;
    for signature in [
        "touch_node_heartbeat(p_node_id text) returns void",
        "append_event_log(p_namespace text, p_event_type text, p_payload jsonb, p_producer_node_id text, \
         p_scheduled_task_id uuid DEFAULT NULL::uuid, p_metadata jsonb DEFAULT '{}'::jsonb) returns bigint",
        "queue_name_for_namespace(p_namespace text) returns text",
        "dead_letter_queue_name_for_namespace(p_namespace text) returns text",
        "run_scheduled_task(p_task_id uuid) returns void",
        "emit(p_namespace text, p_event_type text, p_payload jsonb, p_options jsonb DEFAULT '{}'::jsonb) returns bigint",
    ] {
        assert!(
            found.contains(&json!({"is": signature})),
            "{signature}: {found:#?}"
        );
    }
}
