//! Figures for whoever watches.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use nexus::{
    Client, Database,
    testing::{TestApp, TestDatabase},
};
use nexus_http::Settings;
use reqwest::Method;
use serde_json::json;

use crate::server::{Answer, OrderPaid, Proxy, Server, answer, app};

async fn metrics(server: &Server, accept: &str) -> Answer {
    let request = server.request(Method::GET, "/metrics");
    answer(request.header("accept", accept)).await
}

/// Each series with its value.
fn series(answer: &Answer) -> Vec<(&str, &str)> {
    assert_eq!(answer.status, 200, "{answer:#?}");
    assert_eq!(
        answer.header("content-type"),
        "text/plain; version=0.0.4; charset=utf-8"
    );
    let lines = answer.text.lines();
    let series = lines.filter(|line| !line.starts_with('#'));
    series.map(|line| line.rsplit_once(' ').unwrap()).collect()
}

fn value<'a>(answer: &'a Answer, name: &str) -> &'a str {
    let found = series(answer).into_iter().find(|(found, _)| *found == name);
    found.unwrap_or_else(|| panic!("no {name}: {answer:#?}")).1
}

const COLLECTED: &str = "nexus_namespace_collected_timestamp_seconds{namespace=\"shop\"}";

#[tokio::test]
async fn figures_are_told_to_prometheus_and_as_the_original_server_does() {
    let app = TestApp::start(app()).await;
    app.client().pause_group("parcels").await.unwrap();
    for order in 0..3 {
        let paid = OrderPaid { order, amount: 1.0 };
        app.client().emit(&paid).await.unwrap();
    }
    loop {
        let metrics = app.client().namespace_metrics().await.unwrap();
        let mut groups = metrics.groups.iter();
        if groups.any(|group| group.name == "books" && group.dead_letters.counted == 3) {
            break;
        }
    }
    let server = Server::start(app.client(), Settings::new()).await;
    let text = metrics(&server, "*/*").await;
    for (name, expected) in [
        (
            "nexus_group_depth{namespace=\"shop\",group=\"parcels\"}",
            "3",
        ),
        ("nexus_group_depth{namespace=\"shop\",group=\"books\"}", "0"),
        (
            "nexus_group_dead_letters{namespace=\"shop\",group=\"books\"}",
            "3",
        ),
        (
            "nexus_group_paused{namespace=\"shop\",group=\"parcels\"}",
            "1",
        ),
        ("nexus_nodes{namespace=\"shop\",state=\"live\"}", "1"),
    ] {
        assert_eq!(value(&text, name), expected, "{name}");
    }
    assert_eq!(text.header("vary"), "accept");
    let snapshot = metrics(&server, "application/json, text/plain;q=0.5").await;
    assert_eq!(snapshot.header("content-type"), "application/json");
    let expected = json!({ "queueDepth": 3, "deadLetterQueueDepth": 3 });
    assert_eq!(snapshot.ok(), expected);
    metrics(&server, "text/html")
        .await
        .problem(406, "not-acceptable");
    app.shutdown().await;
}

#[tokio::test]
async fn many_who_ask_are_answered_by_few_questions() {
    let app = TestApp::without_workers(app()).await;
    let server = Server::start(app.client(), Settings::new()).await;
    let answers = join_all((0..50).map(|_| metrics(&server, "text/plain"))).await;
    let times: BTreeSet<&str> = answers
        .iter()
        .map(|answer| value(answer, COLLECTED))
        .collect();
    assert!(times.len() < 10, "{times:?}");
    app.shutdown().await;
}

#[tokio::test]
async fn the_node_of_the_process_is_told_of_in_the_same_text() {
    let database = TestDatabase::new().await;
    let node = nexus::start(app().database_url(database.url()))
        .await
        .unwrap();
    let settings = Settings::new().metrics_of(node.node_metrics());
    let server = Server::start(node.client(), settings).await;
    let paid = OrderPaid {
        order: 2_000,
        amount: 1.0,
    };
    node.client().emit(&paid).await.unwrap();
    let emitted = "nexus_events_emitted_total{namespace=\"shop\",event_type=\"order.paid\"}";
    // Until the node has figures of its own as well, which are not told a second time.
    loop {
        let text = metrics(&server, "text/plain").await;
        let names: Vec<&str> = series(&text).iter().map(|(name, _)| *name).collect();
        let once: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), once.len(), "{names:#?}");
        assert_eq!(value(&text, emitted), "1");
        value(&text, COLLECTED);
        if node.metrics().contains(COLLECTED) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    node.shutdown().await;
}

#[tokio::test]
async fn what_a_node_has_counted_is_there_without_the_figures() {
    let app = TestApp::without_workers(app()).await;
    let settings = Settings::new().metrics_of(app.node_metrics());
    let server = Server::start(app.client(), settings).await;
    sqlx::query("drop table pgmq.q_core_events_shop__books")
        .execute(app.pool())
        .await
        .unwrap();
    let text = metrics(&server, "text/plain").await;
    let most = "nexus_pool_connections{namespace=\"shop\",pool=\"client\",state=\"most\"}";
    assert_eq!(value(&text, most), "10");
    assert!(!text.text.contains("nexus_group"), "{text:#?}");
    let snapshot = metrics(&server, "application/json").await;
    snapshot.problem(500, "internal");
    app.shutdown().await;
}

#[tokio::test]
async fn without_the_database_there_is_a_problem_until_it_is_back() {
    let app = TestApp::without_workers(app()).await;
    let proxy = Proxy::start(app.database()).await;
    let database = Database::from_url(&proxy.url, "the test").unwrap();
    let client = Client::connect(&database, "shop").await.unwrap();
    let server = Server::start(&client, Settings::new()).await;
    series(&metrics(&server, "text/plain").await);
    proxy.cut();
    let until = async |status: u16| {
        loop {
            let answered = metrics(&server, "text/plain").await;
            if answered.status == status {
                break answered;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    until(503).await.problem(503, "database");
    proxy.mend();
    series(&until(200).await);
    app.shutdown().await;
}
