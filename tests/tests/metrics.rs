//! What a node tells Prometheus is what it did, under the names that the documentation lists.

use std::{collections::BTreeMap, time::Duration};

use nexus::{prelude::*, testing::TestDatabase};
use nexus_tests::within;

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
    let (series, kinds) = read(&text);
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

    let documented: BTreeMap<String, String> = include_str!("../../docs/metrics.md")
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `nexus_")?.split(" | ");
            let name = format!("nexus_{}", cells.next()?.trim_end_matches('`'));
            Some((name, cells.next()?.to_owned()))
        })
        .collect();
    assert_eq!(documented, kinds);
    node.shutdown().await;
}
