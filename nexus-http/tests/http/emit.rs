//! `POST /events`

use nexus::testing::TestApp;
use nexus_http::Settings;
use reqwest::{Method, header::HeaderValue};
use serde_json::{Value, json};

use crate::server::{Answer, OrderPaid, Server, answer, app, shop};

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

fn paid(order: u32) -> Value {
    json!({ "eventType": "order.paid", "payload": { "order": order, "amount": 12.5 } })
}

#[track_caller]
fn message_id(answer: &Answer) -> i64 {
    let document = answer.ok();
    assert_eq!(document["status"], "queued");
    document["messageId"].as_i64().unwrap()
}

#[tokio::test]
async fn the_original_servers_requests_are_answered_as_it_did() {
    let (app, server) = shop().await;
    assert_eq!(server.get("/health").await.ok(), json!({ "status": "ok" }));
    let emitted = server.post("/events", &paid(1_000)).await;
    let id = message_id(&emitted);
    assert_eq!(emitted.ok(), json!({ "status": "queued", "messageId": id }));
    app.settled().await;
    let stored = app.emitted::<OrderPaid>().await;
    assert_eq!(stored.len(), 1);
    assert_eq!(stored[0].event_id, id);
    assert_eq!(app.attempts("send").len(), 1, "a worker was given it");

    for missing in [
        json!({}),
        json!({ "eventType": "" }),
        json!({ "eventType": null }),
    ] {
        let refused = server.post("/events", &missing).await;
        let problem = refused.problem(400, "request");
        assert_eq!(problem["error"], "eventType is required");
    }
    app.shutdown().await;
}

#[tokio::test]
async fn fields_and_headers_go_along() {
    let (app, server) = shop().await;
    let mut event = paid(1_000);
    event["key"] = "k".into();
    event["correlationId"] = "c".into();
    event["eventVersion"] = 1.into();
    event["unknown"] = "is left out".into();
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = server.request(Method::POST, "/events").json(&event);
    let request = request.header("traceparent", trace);
    let id = message_id(&answer(request.header("tracestate", "congo=t61")).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["key"], "k");
    assert_eq!(shown["correlationId"], "c");
    assert_eq!(shown["metadata"]["traceparent"], trace, "{shown}");
    assert_eq!(shown["metadata"]["tracestate"], "congo=t61", "{shown}");

    // Nobody's trace is worth an event.
    let request = server.request(Method::POST, "/events").json(&paid(1_001));
    message_id(&answer(request.header("traceparent", "nonsense")).await);
    app.shutdown().await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_its_path() {
    let (app, server) = shop().await;
    let mut wrong = paid(7);
    wrong["payload"]["amount"] = "much".into();
    let problem = server.post("/events", &wrong).await.problem(422, "payload");
    assert_eq!(problem["errors"][0]["path"], "amount", "{problem}");

    let unknown = json!({ "eventType": "order.lost" });
    let refused = server.post("/events", &unknown).await;
    let problem = refused.problem(422, "unknown-event-type");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("declared are order.paid, parcel.sent"),
        "{detail}"
    );

    let mut version = paid(7);
    version["eventVersion"] = 3.into();
    let refused = server.post("/events", &version).await;
    refused.problem(422, "unknown-event-type");
    let refused = server
        .post("/events", &json!({ "eventType": "No Name!" }))
        .await;
    refused.problem(422, "invalid");
    assert!(app.emitted::<OrderPaid>().await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn unknown_types_are_taken_where_that_is_wanted() {
    let app = TestApp::without_workers(app()).await;
    let server = Server::start(app.client(), Settings::new().allow_unknown_types()).await;
    let unknown = json!({ "eventType": "demo.event", "payload": { "hello": "world" } });
    let id = message_id(&server.post("/events", &unknown).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["payload"], json!({ "hello": "world" }));
    let id = message_id(
        &server
            .post("/events", &json!({ "eventType": "demo.event" }))
            .await,
    );
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["payload"], json!({}), "as the original server does");

    // What is known is checked all the same.
    let mut wrong = paid(7);
    wrong["payload"]["amount"] = "much".into();
    server.post("/events", &wrong).await.problem(422, "payload");
    let refused = server
        .post("/events", &json!({ "eventType": "No Name!" }))
        .await;
    refused.problem(422, "invalid");
    app.shutdown().await;
}

fn cloud_event(id: &str, order: u32) -> Value {
    json!({
        "specversion": "1.0", "type": "order.paid", "source": "/checkout", "id": id,
        "time": "2030-01-31T12:00:00Z", "subject": "the order", "comexampleextension": 7,
        "datacontenttype": "application/json", "data": { "order": order, "amount": 3 },
    })
}

#[tokio::test]
async fn cloud_events_are_taken_in_structured_mode() {
    let (app, server) = shop().await;
    let event = cloud_event("one", 1_000).to_string();
    let with_charset = format!("{STRUCTURED}; charset=UTF-8");
    let id = message_id(&server.emit(&with_charset, event.clone()).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["payload"], json!({ "order": 1_000, "amount": 3 }));
    assert_eq!(shown["key"], "the order");
    // Sent again, it is the same event.
    assert_eq!(message_id(&server.emit(STRUCTURED, event).await), id);
    let other = cloud_event("one", 1_001).to_string();
    server
        .emit(STRUCTURED, other)
        .await
        .problem(422, "idempotency-key");

    let mut event = cloud_event("two", 0);
    event.as_object_mut().unwrap().remove("data");
    event["data_base64"] = "eyJvcmRlciI6MTAwMiwiYW1vdW50IjoxfQ==".into();
    event["partitionkey"] = "rather this".into();
    event["correlationid"] = "chain".into();
    event["eventversion"] = 1.into();
    let id = message_id(&server.emit(STRUCTURED, event.to_string()).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["payload"], json!({ "order": 1_002, "amount": 1 }));
    assert_eq!(shown["key"], "rather this");
    assert_eq!(shown["correlationId"], "chain");
    app.shutdown().await;
}

#[tokio::test]
async fn what_is_no_cloud_event_is_refused() {
    let (app, server) = shop().await;
    for (field, value) in [
        ("specversion", json!("0.3")),
        ("specversion", Value::Null),
        ("id", json!("")),
        ("id", json!(7)),
        ("source", json!("")),
        ("data_base64", json!("e30=")),
        ("eventversion", json!("first")),
        ("eventversion", json!(1e30)),
        ("type", Value::Null),
    ] {
        let mut event = cloud_event("x", 1_000);
        event[field] = value.clone();
        let refused = server.emit(STRUCTURED, event.to_string()).await;
        let problem = refused.problem(400, "request");
        assert!(
            problem["detail"].as_str().unwrap().contains(field),
            "{field} {value}: {problem}"
        );
    }
    let mut event = cloud_event("x", 1_000);
    event.as_object_mut().unwrap().remove("data");
    event["data_base64"] = "not base64".into();
    server
        .emit(STRUCTURED, event.to_string())
        .await
        .problem(400, "request");
    event["data_base64"] = "e30=".into();
    event["datacontenttype"] = "image/png".into();
    server
        .emit(STRUCTURED, event.to_string())
        .await
        .problem(415, "media-type");
    server
        .emit("application/cloudevents+avro", "x")
        .await
        .problem(415, "media-type");
    assert!(app.emitted::<OrderPaid>().await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn cloud_events_are_taken_in_binary_mode() {
    let (app, server) = shop().await;
    let request_of = |id: &str, body: &'static str| {
        let request = server.request(Method::POST, "/events");
        request
            .header("ce-specversion", "1.0")
            .header("ce-type", "order.paid")
            .header("ce-source", "/checkout")
            .header("ce-id", id)
            .header("ce-subject", "Gr%C3%BC%C3%9Fe")
            .header("ce-eventversion", "1")
            .body(body)
    };
    let request = |body| request_of("\"b 1\"", body);
    let body = r#"{ "order": 1000, "amount": 3 }"#;
    let json = request(body).header("content-type", "application/json; charset=utf-8");
    let id = message_id(&answer(json).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(shown["payload"], json!({ "order": 1_000, "amount": 3 }));
    assert_eq!(shown["key"], "Grüße");
    let plain = HeaderValue::from_bytes("Grüße".as_bytes()).unwrap();
    let plain = request_of("b 2", body).header("ce-partitionkey", plain);
    let other = message_id(&answer(plain).await);
    let shown = server.get(&format!("/events/{other}")).await.ok();
    assert_eq!(shown["key"], "Grüße");
    assert_ne!(other, id);
    let twice = request(body).header("ce-type", "parcel.sent");
    answer(twice).await.problem(400, "request");
    // Without a content type it is JSON, and it is the same event.
    assert_eq!(message_id(&answer(request(body)).await), id);

    let refused = answer(request("<order/>").header("content-type", "text/xml")).await;
    refused.problem(415, "media-type");
    let refused = answer(request("{")).await;
    refused.problem(400, "request");
    let refused = answer(request(body).header("ce-partitionkey", "%ff")).await;
    refused.problem(400, "request");
    let lacking = server
        .request(Method::POST, "/events")
        .header("ce-specversion", "1.0");
    let problem = answer(lacking.body(body)).await.problem(400, "request");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("missing field `id`"),
        "{problem}"
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_batch_is_stored_whole_or_not_at_all() {
    let (app, server) = shop().await;
    let good = json!([
        cloud_event("1", 1_000),
        cloud_event("2", 1_001),
        cloud_event("1", 1_000)
    ]);
    let answered = server.emit(BATCH, good.to_string()).await.ok();
    let ids = answered["messageIds"].as_array().unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], ids[2], "it is the same event");
    assert_ne!(ids[0], ids[1]);

    let mut wrong = cloud_event("4", 1_003);
    wrong["data"]["amount"] = "much".into();
    let bad = json!([cloud_event("3", 1_002), wrong]);
    let problem = server
        .emit(BATCH, bad.to_string())
        .await
        .problem(422, "payload");
    assert_eq!(problem["errors"][0]["path"], "[1] amount");
    assert!(
        problem["detail"].as_str().unwrap().starts_with("event 1: "),
        "{problem}"
    );
    // What is found out only when it is stored.
    let bad = json!([cloud_event("5", 1_004), cloud_event("1", 1_005)]);
    let refused = server.emit(BATCH, bad.to_string()).await;
    refused.problem(422, "idempotency-key");
    assert_eq!(app.emitted::<OrderPaid>().await.len(), 2);

    let empty = server.emit(BATCH, "[]").await.ok();
    assert_eq!(empty, json!({ "status": "queued", "messageIds": [] }));
    let request = server
        .request(Method::POST, "/events")
        .header("content-type", BATCH);
    let refused = answer(request.header("idempotency-key", "k").body("[]")).await;
    refused.problem(400, "request");
    app.shutdown().await;
}

#[tokio::test]
async fn an_idempotency_key_stores_one_event_also_of_two_at_once() {
    let (app, server) = shop().await;
    let emit = async |key: &str, order: u32| {
        let request = server.request(Method::POST, "/events").json(&paid(order));
        answer(request.header("idempotency-key", key)).await
    };
    let (one, two) = tokio::join!(emit("k", 1_000), emit("k", 1_000));
    let id = message_id(&one);
    assert_eq!(message_id(&two), id);
    assert_eq!(
        message_id(&emit("\"k\"", 1_000).await),
        id,
        "in quotes it is the same"
    );
    assert_eq!(app.emitted::<OrderPaid>().await.len(), 1);

    emit("k", 1_001).await.problem(422, "idempotency-key");
    emit("", 1_000).await.problem(422, "invalid");
    emit(&"x".repeat(1_001), 1_000)
        .await
        .problem(422, "invalid");
    app.shutdown().await;
}

#[tokio::test]
async fn numbers_without_a_place_in_64_bits_are_of_double_precision() {
    let (app, server) = shop().await;
    let body = r#"{ "eventType": "order.paid", "payload": { "order": 1000, "amount": 123456789012345678901234567890 } }"#;
    let id = message_id(&server.emit("application/json", body).await);
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(
        shown["payload"]["amount"].as_f64(),
        Some(1.234_567_890_123_456_8e29)
    );
    app.settled().await;
    assert_eq!(app.attempts("book").len(), 1);
    app.shutdown().await;
}

#[tokio::test]
async fn hostile_bodies_are_refused_and_nothing_is_stored() {
    let (app, server) = shop().await;
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let deep = format!(r#"{{ "eventType": "order.paid", "payload": {deep} }}"#);
    for body in [
        "",
        "{",
        "[]",
        "7",
        "null",
        "\u{0}",
        "{\"eventType\": 7}",
        &deep,
        r#"{ "eventType": "order.paid", "payload": { "order": 1e999, "amount": 1 } }"#,
        r#"{ "eventType": "order.paid", "eventVersion": -1 }"#,
        r#"{ "eventType": "order.paid", "eventVersion": 99999999999 }"#,
        r#"{ "eventType": "order.paid" } trailing"#,
    ] {
        let refused = server.emit("application/json", body.to_owned()).await;
        refused.problem(400, "request");
    }
    let not_utf8 = [&b"{\"eventType\": \""[..], &[0xff, 0xfe], b"\"}"].concat();
    server
        .emit("application/json", not_utf8)
        .await
        .problem(400, "request");
    for body in [
        r#"{ "eventType": "order.paid\u0000" }"#,
        r#"{ "eventType": "order.paid", "key": "\u0000", "payload": { "order": 1, "amount": 1 } }"#,
        r#"{ "eventType": "order.paid", "correlationId": "\u0000", "payload": { "order": 1, "amount": 1 } }"#,
        r#"{ "eventType": "order.paid", "payload": { "order": 1, "amount": 1, "more": "\u0000" } }"#,
    ] {
        server
            .emit("application/json", body)
            .await
            .problem(422, "invalid");
    }
    for body in [
        r#"{ "eventType": "order.paid", "payload": { "order": -1, "amount": 1 } }"#,
        r#"{ "eventType": "order.paid", "payload": null }"#,
    ] {
        server
            .emit("application/json", body)
            .await
            .problem(422, "payload");
    }
    for content_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "nonsense",
    ] {
        let refused = server.emit(content_type, paid(7).to_string()).await;
        refused.problem(415, "media-type");
    }
    assert!(app.emitted::<OrderPaid>().await.is_empty());
    app.shutdown().await;
}
