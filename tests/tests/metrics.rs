//! What a node tells Prometheus is what it did, and what its namespace is like, under the names that the documentation
//! lists.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use nexus::{
    client::{GroupMetrics, NamespaceMetrics},
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::{until, within};
use tokio::sync::Semaphore;

/// A page to print.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "page.sent")]
struct PageSent {
    number: i64,
}

/// A page that is on paper.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "page.printed")]
struct PagePrinted {
    number: i64,
}

/// Page 1 jams once, page 2 always.
#[handler(group = "office", max_attempts = 3, backoff = "fixed(5ms)")]
async fn print(page: Envelope<PageSent>) -> nexus::Result<Emit<PagePrinted>> {
    match (page.number, page.attempt()) {
        (1, 1) | (2, _) => Err("the paper is jammed".into()),
        (number, _) => Ok(Emit(PagePrinted { number })),
    }
}

#[handler(group = "office")]
async fn bind(pages: Batch<PagePrinted>, tx: &mut Tx) -> nexus::Result {
    assert!(!pages.is_empty());
    sqlx::query("select 1").execute(&mut **tx).await?;
    Ok(())
}

#[cron("* * * * * *", group = "office")]
async fn look_for_paper(_tick: Tick) {}

/// The value of each series, and the kind of each family.
fn read(text: &str) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let (mut series, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            assert!(
                kinds.insert(name.to_owned(), kind.to_owned()).is_none(),
                "{name} twice"
            );
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let value = value.to_owned();
            assert!(
                series.insert(name.to_owned(), value).is_none(),
                "{name} twice"
            );
        }
    }
    (series, kinds)
}

fn of_handler(name: &str, handler: &str) -> String {
    format!("{name}{{namespace=\"demo\",group=\"office\",handler=\"{handler}\"}}")
}

#[tokio::test]
async fn a_node_counts_and_times_what_it_does() {
    let database = TestDatabase::new().await;
    let app = App::discover()
        .name("press")
        .database_url(database.url())
        .only(["print", "bind", "look_for_paper"]);
    let node = nexus::start(app).await.unwrap();
    for number in 0..5 {
        node.client().emit(&PageSent { number }).await.unwrap();
    }
    within("all is handled", async {
        let are_done = |handler, done| {
            let stats = node.stats();
            let stats = stats.iter().find(|stats| stats.handler == handler).unwrap();
            stats.completed + stats.dead_lettered >= done
        };
        while !(are_done("print", 5) && are_done("bind", 4) && are_done("look_for_paper", 1)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // An attempt is counted a moment before it has left its slot.
    within("no attempt runs", async {
        let is_running = |handler| {
            let (series, _) = read(&node.metrics());
            series[&of_handler("nexus_messages_running", handler)] != "0"
        };
        while is_running("print") || is_running("bind") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let text = node.metrics();
    let (series, _) = read(&text);
    let value = |name: &str| {
        series
            .get(name)
            .map_or_else(|| panic!("no {name} in\n{text}"), String::as_str)
    };
    let number = |name: &str| value(name).parse::<f64>().unwrap();
    let emitted = |of: &str| {
        value(&format!(
            "nexus_events_emitted_total{{namespace=\"demo\",event_type=\"{of}\"}}"
        ))
    };
    assert_eq!((emitted("page.sent"), emitted("page.printed")), ("5", "4"));
    for (name, printed, bound) in [
        // Three attempts at page 2, two at page 1.
        ("nexus_messages_claimed_total", "8", "4"),
        ("nexus_messages_completed_total", "4", "4"),
        ("nexus_messages_retried_total", "3", "0"),
        ("nexus_messages_dead_lettered_total", "1", "0"),
        ("nexus_messages_snoozed_total", "0", "0"),
        ("nexus_messages_abandoned_total", "0", "0"),
        ("nexus_leases_lost_total", "0", "0"),
        // Only first attempts have waited.
        ("nexus_emit_to_start_seconds_count", "5", "4"),
    ] {
        assert_eq!(value(&of_handler(name, "print")), printed, "{name}");
        assert_eq!(value(&of_handler(name, "bind")), bound, "{name}");
    }
    assert_eq!(
        value(&of_handler("nexus_attempt_duration_seconds_count", "print")),
        "8"
    );
    assert!(number(&of_handler("nexus_attempt_duration_seconds_sum", "print")) > 0.0);
    assert!(number(&of_handler("nexus_emit_to_start_seconds_sum", "print")) > 0.0);
    assert!(number("nexus_tick_lateness_seconds_count{namespace=\"demo\"}") >= 1.0);
    assert!(
        number("nexus_pool_connections{namespace=\"demo\",pool=\"client\",state=\"most\"}") >= 2.0
    );

    // The only node is the one that tells of the namespace.
    let text = until("the figures of the namespace are collected", async || {
        let text = node.metrics();
        text.contains("nexus_group_depth").then_some(text)
    })
    .await;
    let (series, kinds) = read(&text);
    let told: BTreeMap<String, Documented> = kinds
        .into_iter()
        .map(|(name, kind)| {
            let labels = labels_of(&name, series.keys());
            (name, (kind, labels))
        })
        .collect();
    assert_eq!(documented(), told);
    node.shutdown().await;
}

/// Kind and labels of a metric.
type Documented = (String, BTreeSet<String>);

/// The rows of the tables in `docs/metrics.md`.
fn documented() -> BTreeMap<String, Documented> {
    let rows = include_str!("../../docs/metrics.md").lines();
    rows.filter_map(|line| {
        let cells = line.strip_prefix("| `nexus_")?.split('|');
        let cells: Vec<&str> = cells.map(|cell| cell.trim().trim_matches('`')).collect();
        let labels = cells[2].split(", ").map(|label| label.trim_matches('`'));
        let labels = labels.filter(|label| !label.is_empty()).map(str::to_owned);
        let name = format!("nexus_{}", cells[0]);
        Some((name, (cells[1].to_owned(), labels.collect())))
    })
    .collect()
}

/// The labels that the series of a family have beside the one that all have.
fn labels_of<'a>(family: &str, series: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for series in series {
        let (name, labels) = series.split_once('{').unwrap();
        let suffix = name.strip_prefix(family);
        if suffix.is_some_and(|suffix| ["", "_bucket", "_sum", "_count"].contains(&suffix)) {
            let labels = labels.trim_end_matches('}').split("\",");
            found.extend(labels.map(|label| label.split('=').next().unwrap().to_owned()));
        }
    }
    assert!(found.remove("namespace"), "{family}: {found:?}");
    found.remove("le");
    found
}

/// A document.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "document.written")]
struct DocumentWritten {
    number: i64,
}

/// Takes its time.
#[handler(group = "desk")]
async fn sign(_document: DocumentWritten, gate: State<Arc<Semaphore>>) {
    let _ = gate.acquire().await;
}

/// Tries again much later.
#[handler(group = "archive", backoff = "fixed(1h)")]
async fn shelve(_document: DocumentWritten) -> nexus::Result {
    Err("the shelf is full".into())
}

#[handler(group = "shredder")]
async fn shred(document: DocumentWritten) -> nexus::Result {
    match document.number {
        0 | 1 => Err(Error::permanent("there is a clip in it")),
        _ => Ok(()),
    }
}

#[handler(group = "attic")]
async fn store_away(_document: DocumentWritten) {}

#[cron("0 0 1 1 *", group = "attic")]
async fn tidy_up(_tick: Tick) {}

fn of<'a>(metrics: &'a NamespaceMetrics, group: &str) -> &'a GroupMetrics {
    let mut groups = metrics.groups.iter();
    let found = groups.find(|found| found.name == group);
    found.unwrap_or_else(|| panic!("no group {group} in {metrics:#?}"))
}

/// A namespace with something of everything. Its gate lets nothing through.
async fn office() -> (TestApp, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let handlers = ["sign", "shelve", "shred", "store_away", "tidy_up"];
    let app = App::discover().only(handlers).state(Arc::clone(&gate));
    let app = TestApp::start(app).await;
    let client = app.client();
    client.pause_group("attic").await.unwrap();
    for number in 0..5 {
        client.emit(&DocumentWritten { number }).await.unwrap();
    }
    let delayed = DocumentWritten { number: 9 };
    let delayed = client.emit(&delayed).after(Duration::from_hours(24));
    delayed.await.unwrap();
    until("all has been tried", async || {
        let metrics = client.namespace_metrics().await.unwrap();
        let is_done = of(&metrics, "desk").leased == 5
            && of(&metrics, "archive").failed == 5
            && of(&metrics, "shredder").depth.counted == 0;
        is_done.then_some(())
    })
    .await;
    app.advance(Duration::from_mins(10)).await;
    for statement in [
        "update core.scheduled_tasks
         set next_run_at = core.now() - interval '1 hour', put_off_until = core.now() + interval '1 day'",
        "insert into core.nodes (node_id, namespace, app, last_heartbeat)
         values ('dead', 'demo', 'another', core.now() - interval '1 minute')",
    ] {
        sqlx::query(statement).execute(app.pool()).await.unwrap();
    }
    let replay = client.replay("attic").rate(0.0001);
    replay.start().await.unwrap();
    (app, gate)
}

#[tokio::test]
async fn the_figures_of_a_namespace_are_what_is_there() {
    let (app, gate) = office().await;
    let metrics = app.client().namespace_metrics().await.unwrap();
    let counts = |group: &str| {
        let group = of(&metrics, group);
        let letters = group.dead_letters.counted;
        (group.depth.counted, group.failed, group.leased, letters)
    };
    assert_eq!(counts("desk"), (5, 0, 5, 0));
    // None of them is due.
    assert_eq!(counts("archive"), (5, 5, 0, 0));
    assert_eq!(counts("shredder"), (0, 0, 0, 2));
    let attic = of(&metrics, "attic");
    assert!(attic.depth.counted >= 5 && attic.leased == 0, "{attic:?}");
    let paused = metrics
        .groups
        .iter()
        .map(|group| (&*group.name, group.is_paused));
    assert_eq!(
        paused.collect::<Vec<_>>(),
        [
            ("archive", false),
            ("attic", true),
            ("default", false),
            ("desk", false),
            ("shredder", false)
        ]
    );
    for group in &metrics.groups {
        if group.name == "attic" {
            assert!(group.lag >= Duration::from_mins(10), "{group:?}");
        } else {
            assert!(group.lag.is_zero(), "{group:?}");
        }
    }
    assert_eq!((metrics.live_nodes, metrics.silent_nodes), (1, 1));
    assert_eq!(metrics.overdue_schedules.counted, 1);
    assert_eq!(metrics.delayed_emits.counted, 1);
    assert_eq!(metrics.running_replays.counted, 1);
    assert_eq!(metrics.partitions_ahead, 12);
    assert!(metrics.collected_at <= app.now().await);
    gate.add_permits(5);
    app.shutdown().await;
}

#[tokio::test]
async fn the_text_says_what_the_figures_are() {
    let (app, gate) = office().await;
    let metrics = app.client().namespace_metrics().await.unwrap();
    let (series, _) = read(&metrics.text());
    for (name, label, value) in [
        ("nexus_group_depth", ",group=\"desk\"", "5"),
        ("nexus_group_leased", ",group=\"desk\"", "5"),
        ("nexus_group_failed", ",group=\"archive\"", "5"),
        ("nexus_group_paused", ",group=\"attic\"", "1"),
        ("nexus_group_paused", ",group=\"desk\"", "0"),
        ("nexus_group_dead_letters", ",group=\"shredder\"", "2"),
        ("nexus_nodes", ",state=\"live\"", "1"),
        ("nexus_nodes", ",state=\"silent\"", "1"),
        ("nexus_schedules_overdue", "", "1"),
        ("nexus_delayed_emits_waiting", "", "1"),
        ("nexus_replays_running", "", "1"),
        ("nexus_partitions_ahead", "", "12"),
    ] {
        let name = format!("{name}{{namespace=\"demo\"{label}}}");
        assert_eq!(series[&name], value, "{name}");
    }
    let lag = of(&metrics, "attic").lag;
    for (name, label, expected) in [
        ("nexus_group_lag_seconds", ",group=\"attic\"", lag),
        (
            "nexus_partition_headroom_seconds",
            "",
            metrics.partition_headroom,
        ),
        (
            "nexus_namespace_collection_duration_seconds",
            "",
            metrics.took,
        ),
        (
            "nexus_namespace_collected_timestamp_seconds",
            "",
            metrics.collected_at.as_duration().unsigned_abs(),
        ),
    ] {
        let name = format!("{name}{{namespace=\"demo\"{label}}}");
        let told: f64 = series[&name].parse().unwrap();
        assert!(
            (told - expected.as_secs_f64()).abs() < 0.001,
            "{name}: {told} {expected:?}"
        );
    }
    gate.add_permits(5);
    app.shutdown().await;
}

#[tokio::test]
async fn counting_ends_somewhere_and_says_so() {
    let app = TestApp::without_workers(App::discover().only(["store_away"])).await;
    for table in ["attic", "attic_dlq"] {
        let text = format!(
            "insert into pgmq.q_core_events_demo__{table} (vt, message, headers)
             select core.now(), '{{}}', '{{\"handler\": \"store_away\", \"eventVersion\": \"1\", \"attempts\": 1}}'
             from generate_series(1, 10001)"
        );
        let statement = sqlx::query(sqlx::AssertSqlSafe(text));
        statement.execute(app.pool()).await.unwrap();
    }
    let metrics = app.client().namespace_metrics().await.unwrap();
    let attic = of(&metrics, "attic");
    for depth in [attic.depth, attic.dead_letters] {
        assert_eq!(depth.to_string(), "10000+");
    }
    assert_eq!(attic.failed, 10_000);
    // One less is all there are.
    sqlx::query("delete from pgmq.q_core_events_demo__attic_dlq where msg_id = 1")
        .execute(app.pool())
        .await
        .unwrap();
    let metrics = app.client().namespace_metrics().await.unwrap();
    assert_eq!(of(&metrics, "attic").dead_letters.to_string(), "10000");
    app.shutdown().await;
}

#[tokio::test]
async fn headroom_ends_where_the_first_partition_is_missing() {
    let app = TestApp::without_workers(App::discover().only(["store_away"])).await;
    for months in [13, 3, 0] {
        let (left, name): (f64, String) = sqlx::query_as(
            "select extract(epoch from m - (core.now() at time zone 'UTC'))::float8, 'event_log_' || to_char(m, 'YYYY_MM')
             from (select date_trunc('month', core.now() at time zone 'UTC') + make_interval(months => $1)) _ (m)",
        )
        .bind(months)
        .fetch_one(app.pool())
        .await
        .unwrap();
        if months < 13 {
            let text = format!("alter table core.event_log detach partition core.{name}");
            let statement = sqlx::query(sqlx::AssertSqlSafe(text));
            statement.execute(app.pool()).await.unwrap();
        }
        let metrics = app.client().namespace_metrics().await.unwrap();
        // The clock goes on.
        let passed = left.max(0.0) - metrics.partition_headroom.as_secs_f64();
        assert!(
            (0.0..600.0).contains(&passed),
            "{months}: {left} {metrics:?}"
        );
    }
    app.shutdown().await;
}

#[tokio::test]
async fn an_open_transaction_shows_in_the_figures() {
    let app = TestApp::without_workers(App::discover().only(["store_away"])).await;
    let mut open = app.pool().begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select 1")
        .execute(&mut *open)
        .await
        .unwrap();
    let metrics = app.client().namespace_metrics().await.unwrap();
    let holder = metrics.xmin_holder.as_ref().unwrap();
    assert_eq!(holder.kind, "session");
    let (series, _) = read(&metrics.text());
    let age = &series["nexus_xmin_age_seconds{namespace=\"demo\"}"];
    let age: f64 = age.parse().unwrap();
    assert!((age - holder.age.unwrap().as_secs_f64()).abs() < 0.001);
    drop(open);
    app.shutdown().await;
}

#[tokio::test]
async fn one_node_of_several_tells_of_the_namespace() {
    let database = TestDatabase::new().await;
    let app = || {
        let app = App::discover().only(["store_away"]);
        app.database_url(database.url())
    };
    let first = nexus::start(app()).await.unwrap();
    let second = nexus::start(app()).await.unwrap();
    let until_it_tells = async |node: &nexus::Handle| {
        until("a node tells figures", async || {
            node.metrics().contains("nexus_group_depth{").then_some(())
        })
        .await;
    };
    let tells_when = |text: &str| text.contains("nexus_namespace_collected_timestamp_seconds");
    until_it_tells(&first).await;
    assert!(!tells_when(&second.metrics()));
    let of_first = first.node_metrics();
    first.shutdown().await;
    // One that has stopped tells what it did, and nothing of the namespace any more.
    assert!(!tells_when(&of_first.text()));
    assert!(of_first.text().contains("nexus_messages_claimed_total"));
    until_it_tells(&second).await;
    second.shutdown().await;
}

const DASHBOARD: &str = include_str!("../../deploy/grafana/nexus.json");
const RULES: &str = include_str!("../../deploy/prometheus/nexus.rules.yml");
const RULE_TESTS: &str = include_str!("../../deploy/prometheus/nexus.rules.test.yml");

/// The names of metrics in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("nexus_")).collect()
}

#[test]
fn dashboard_and_rules_ask_for_what_there_is() {
    let documented = documented();
    let is_there = |name: &str| {
        documented.contains_key(name)
            || ["_bucket", "_sum", "_count"].iter().any(|suffix| {
                let family = name.strip_suffix(suffix);
                let found = family.and_then(|family| documented.get(family));
                found.is_some_and(|(kind, _)| kind == "histogram")
            })
    };
    for (what, text) in [
        ("dashboard", DASHBOARD),
        ("rules", RULES),
        ("tests", RULE_TESTS),
    ] {
        let names = names(text);
        assert!(names.len() > 10, "{what}: {names:?}");
        for name in names {
            assert!(
                is_there(name),
                "the {what} know {name}, docs/metrics.md does not"
            );
        }
    }
    // What a node tells of is on the dashboard.
    let shown = names(DASHBOARD);
    for name in documented.keys() {
        let is_shown = shown.iter().any(|shown| shown.starts_with(name.as_str()));
        assert!(is_shown, "the dashboard does not show {name}");
    }
}

#[test]
fn each_alert_says_what_to_do_and_is_tried() {
    let operations = include_str!("../../docs/operations.md");
    let alerts = RULES.split("- alert: ").skip(1);
    let mut names = BTreeSet::new();
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        assert!(names.insert(name), "{name} twice");
        for annotation in ["summary: ", "description: ", "severity: "] {
            assert!(alert.contains(annotation), "{name} has no {annotation}");
        }
        let place = format!("runbook: docs/operations.md#{}\n", name.to_lowercase());
        assert!(alert.contains(&place), "{name} leads nowhere");
        let heading = format!("\n### {name}\n");
        assert!(
            operations.contains(&heading),
            "docs/operations.md has no {name}"
        );
        assert!(RULE_TESTS.contains(name), "{name} has no test");
    }
    let headings = operations
        .lines()
        .filter_map(|line| line.strip_prefix("### Nexus"));
    assert_eq!(headings.count(), names.len(), "an alert that is no more");
}

#[test]
fn the_dashboard_is_imported_as_it_is() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    assert!(dashboard["schemaVersion"].as_i64().unwrap() >= 41);
    // Nothing that an importer would have to fill in, and no source of data but the one that is chosen.
    assert!(dashboard.get("__inputs").is_none());
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_i64().unwrap()), "{panel}");
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
            assert!(!panel["targets"].as_array().unwrap().is_empty(), "{panel}");
        }
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let variables: Vec<&str> = variables
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    assert_eq!(variables, ["datasource", "namespace", "group"]);
}
