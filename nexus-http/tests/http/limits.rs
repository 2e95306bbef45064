//! Size, time, and a database that is away.

use std::time::Duration;

use nexus::{Client, Database, testing::TestApp};
use nexus_http::Settings;
use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::server::{OrderPaid, Proxy, Server, answer, app, shop};

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let app = TestApp::without_workers(app()).await;
    let settings = Settings::new().body_bytes(3_000_000).batch_events(2);
    let server = Server::start(app.client(), settings).await;
    let event = |bytes: usize| {
        let payload = json!({ "order": 1, "amount": 1, "more": "x".repeat(bytes) });
        json!({ "eventType": "order.paid", "payload": payload })
    };
    server.post("/events", &event(900_000)).await.ok();
    // More than a payload may have, more than a body may have.
    server
        .post("/events", &event(1_100_000))
        .await
        .problem(413, "too-large");
    server
        .post("/events", &event(3_000_000))
        .await
        .problem(413, "too-large");
    let redrive = async |bytes: usize| {
        let which = json!({ "which": { "handler": "x".repeat(bytes) } });
        server.post("/dead-letters/books/redrive", &which).await
    };
    assert_eq!(redrive(2_500_000).await.ok()["messages"], 0);
    redrive(3_000_000).await.problem(413, "too-large");
    let one = |id: u32| json!({ "specversion": "1.0", "type": "order.paid", "source": "s", "id": id.to_string() });
    let batch = json!([one(1), one(2), one(3)]).to_string();
    let refused = server
        .emit("application/cloudevents-batch+json", batch)
        .await;
    refused.problem(413, "too-large");
    assert_eq!(app.emitted::<OrderPaid>().await.len(), 1);
    app.shutdown().await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let app = TestApp::without_workers(app()).await;
    let settings = Settings::new().timeout(Duration::from_millis(100));
    let server = Server::start(app.client(), settings).await;
    let mut socket = TcpStream::connect(server.address()).await.unwrap();
    let head = "POST /events HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut told = String::new();
    let reading = socket.read_to_string(&mut told);
    let read = tokio::time::timeout(Duration::from_mins(1), reading).await;
    read.expect("it waits for ever").unwrap();
    assert!(told.starts_with("HTTP/1.1 503 "), "{told}");
    assert!(told.contains("urn:nexus:problem:timeout"), "{told}");
    app.shutdown().await;
}

#[tokio::test]
async fn without_a_database_the_server_lives_and_says_when_to_come_back() {
    let app = TestApp::without_workers(app()).await;
    let proxy = Proxy::start(app.database()).await;
    let database = Database::from_url(&proxy.url, "the test").unwrap();
    let client = Client::connect(&database, "shop").await.unwrap();
    let server = Server::start(&client, Settings::new()).await;
    let event = json!({ "eventType": "order.paid", "payload": { "order": 1, "amount": 1 } });
    server.get("/health/ready").await.ok();
    server.post("/events", &event).await.ok();

    proxy.cut();
    for (method, path) in [
        (Method::GET, "/health/ready"),
        (Method::GET, "/events"),
        (Method::GET, "/schedules"),
        (Method::POST, "/events"),
    ] {
        let request = server.request(method, path).json(&event);
        let refused = answer(request).await;
        let problem = refused.problem(503, "database");
        assert_eq!(refused.header("retry-after"), "5", "{path}");
        assert_eq!(
            problem["detail"],
            "the database cannot be asked at the moment"
        );
    }
    server.get("/health").await.ok();
    server.get("/health/live").await.ok();

    proxy.mend();
    server.post("/events", &event).await.ok();
    server.get("/health/ready").await.ok();
    app.shutdown().await;
}

#[tokio::test]
async fn what_the_database_refuses_stays_in_the_log_of_the_server() {
    let app = TestApp::without_workers(app()).await;
    let server = Server::start(app.client(), Settings::new()).await;
    sqlx::query("alter table core.event_types rename column schema to hidden")
        .execute(app.pool())
        .await
        .unwrap();
    let problem = server.get("/schemas").await.problem(500, "internal");
    let text = problem.to_string();
    for secret in ["column", "schema", "hidden", "select", "core."] {
        assert!(!text.contains(secret), "{text}");
    }
    app.shutdown().await;
}

#[tokio::test]
async fn answers_are_kept_out_of_caches() {
    let (app, server) = shop().await;
    for path in ["/events", "/health", "/nowhere/near", "/events/0"] {
        let answer = server.get(path).await;
        assert_eq!(answer.header("cache-control"), "no-store", "{path}");
    }
    let refused = answer(server.request(Method::DELETE, "/events")).await;
    refused.problem(405, "method");
    let mut allowed: Vec<&str> = refused.header("allow").split(',').collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["GET", "HEAD", "POST"]);
    app.shutdown().await;
}
