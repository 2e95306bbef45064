//! The description says what the router does.

use std::collections::BTreeSet;

use nexus::testing::TestApp;
use nexus_http::Settings;
use reqwest::Method;
use serde_json::{Value, json};

use crate::server::{OrderPaid, Server, answer, app, shop};

/// Every method and path of the description.
fn operations(description: &Value) -> Vec<(Method, String, &Value)> {
    let paths = description["paths"].as_object().unwrap();
    let all = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(move |(method, operation)| {
            let method = method.to_uppercase().parse().unwrap();
            (method, path.clone(), operation)
        })
    });
    all.collect()
}

/// Every route that the crate's source gives a handler.
const ROUTES: [&str; 27] = [
    "GET /health",
    "GET /health/live",
    "GET /health/ready",
    "GET /events",
    "POST /events",
    "GET /events/{id}",
    "GET /dead-letters",
    "GET /dead-letters/causes",
    "GET /dead-letters/{group}/{id}",
    "POST /dead-letters/{group}/redrive",
    "POST /dead-letters/{group}/{id}/redrive",
    "POST /dead-letters/{group}/purge",
    "GET /schedules",
    "GET /schedules/{name}",
    "GET /schedules/{name}/history",
    "POST /schedules/{name}/pause",
    "POST /schedules/{name}/resume",
    "POST /schedules/{name}/run",
    "GET /metrics",
    "GET /groups",
    "POST /groups/{group}/pause",
    "POST /groups/{group}/resume",
    "GET /nodes",
    "GET /schemas",
    "GET /schemas/{eventType}",
    // What describes does not describe itself.
    "GET /openapi.json",
    "GET /docs",
];

#[tokio::test]
async fn every_route_is_described_and_every_description_is_a_route() {
    let (app, server) = shop().await;
    let description = server.get("/openapi.json").await.ok();
    assert!(description["openapi"].as_str().unwrap().starts_with("3.1."));
    let described: BTreeSet<String> = operations(&description)
        .iter()
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    let expected: BTreeSet<String> = ROUTES[..25].iter().map(|&route| route.to_owned()).collect();
    assert_eq!(described, expected);

    for (method, path, operation) in operations(&description) {
        assert!(operation["summary"].is_string(), "{path}");
        // A route that were not there would have no problem of its own to tell.
        let there = path.replace("{id}", "0").replace(['{', '}'], "");
        let answered = answer(server.request(method.clone(), &there)).await;
        assert!(
            answered.status == 200 || answered.header("content-type") == "application/problem+json",
            "{method} {path}: {answered:?}"
        );
        let status = answered.status.as_u16().to_string();
        assert!(
            operation["responses"][&status].is_object(),
            "{method} {path} answers {status}"
        );
    }
    app.shutdown().await;
}

#[test]
fn every_route_is_documented_with_its_scope() {
    let documentation = include_str!("../../../docs/http.md");
    for route in ROUTES {
        let quoted = format!("`{route}`");
        let mut rows = documentation.lines().filter(|line| line.starts_with("| "));
        let row = rows.find(|row| row.contains(&quoted));
        let row = row.unwrap_or_else(|| panic!("{route} is not in docs/http.md"));
        let is_open = ["/health", "/docs", "/openapi"]
            .iter()
            .any(|open| route.contains(open));
        let scope = match route {
            "POST /events" => "| `emit` |",
            _ if route.starts_with("POST ") => "| `operate` |",
            _ if is_open => "| none |",
            _ => "| `read` |",
        };
        assert!(row.contains(scope), "{row}");
    }
}

#[tokio::test]
async fn without_a_token_nothing_that_needs_a_scope_is_served() {
    let app = TestApp::without_workers(app()).await;
    let server = Server::start_for_others(app.client(), Settings::new()).await;
    let description = server.get("/openapi.json").await.ok();
    for (method, path, operation) in operations(&description) {
        let is_open = operation["security"] == json!([{}]);
        assert_eq!(is_open, path.starts_with("/health"), "{path}");
        let there = path.replace("{id}", "0");
        let answered = answer(server.request(method.clone(), &there)).await;
        let expected = if is_open { 200 } else { 401 };
        assert_eq!(answered.status, expected, "{method} {path}");
    }
    app.shutdown().await;
}

/// A schema of the description, as a document of its own.
fn schema(description: &Value, schema: &Value) -> Value {
    let mut document = schema.clone();
    document["components"] = description["components"].clone();
    document
}

#[track_caller]
fn assert_fits(description: &Value, wanted: &Value, instance: &Value, what: &str) {
    let mut schemas = boon::Schemas::new();
    let mut compiler = boon::Compiler::new();
    compiler.enable_format_assertions();
    compiler
        .add_resource("urn:nexus:test", schema(description, wanted))
        .unwrap();
    let wanted = compiler.compile("urn:nexus:test", &mut schemas).unwrap();
    if let Err(error) = schemas.validate(instance, wanted) {
        panic!("{what}: {error:#}\n{instance:#}");
    }
}

#[tokio::test]
async fn examples_fit_their_schemas() {
    let (app, server) = shop().await;
    let description = server.get("/openapi.json").await.ok();
    let mut examples = 0;
    for (name, component) in description["components"]["schemas"].as_object().unwrap() {
        if let Some(example) = component.get("example") {
            assert_fits(&description, component, example, name);
            examples += 1;
        }
    }
    assert!(examples >= 5, "{examples}");

    // And the example of an event is one, once its type is declared.
    let example = &description["components"]["schemas"]["NewEvent"]["example"];
    server.post("/events", example).await.ok();
    app.shutdown().await;
}

#[tokio::test]
async fn answers_fit_their_schemas() {
    let (app, server) = shop().await;
    app.client()
        .emit(&OrderPaid {
            order: 7,
            amount: 1.0,
        })
        .await
        .unwrap();
    app.settled().await;
    app.client().run_schedule_now("count_stock").await.unwrap();
    let letter = server.get("/dead-letters").await.ok()[0]["deadLetterId"].to_string();
    let event = server.get("/events?type=order.paid").await.ok()[0]["eventId"].to_string();
    let description = server.get("/openapi.json").await.ok();
    for (method, path, operation) in operations(&description) {
        let id = if path.starts_with("/events") {
            &event
        } else {
            &letter
        };
        let there = path
            .replace("{id}", id)
            .replace("{group}", "books")
            .replace("{name}", "count_stock")
            .replace("{eventType}", "order.paid");
        let body = match path.as_str() {
            "/events" => {
                json!({ "eventType": "order.paid", "payload": { "order": 8, "amount": 1 } })
            }
            "/dead-letters/{group}/{id}/redrive" => json!({ "dryRun": true }),
            _ => json!({ "which": { "all": true }, "dryRun": true }),
        };
        let request = server.request(method.clone(), &there);
        let request = request.header("accept", "application/json");
        let request = if method == Method::POST {
            request.json(&body)
        } else {
            request
        };
        let answered = answer(request).await;
        let document = answered.ok();
        let content = &operation["responses"]["200"]["content"]["application/json"];
        assert_fits(
            &description,
            &content["schema"],
            &document,
            &format!("{method} {path}"),
        );
    }
    // Problems as well.
    let problem = server.get("/events/0").await.problem(404, "not-found");
    let component = &description["components"]["schemas"]["Problem"];
    assert_fits(&description, component, &problem, "a problem");
    app.shutdown().await;
}

#[tokio::test]
async fn the_page_has_nothing_of_another_host() {
    let app = TestApp::without_workers(app()).await;
    // Wherever it is mounted.
    let router = nexus_http::router(app.client().clone(), Settings::new());
    let router = axum::Router::new()
        .route("/", axum::routing::get(async || "mine"))
        .nest("/nexus", router);
    let server = Server::serve(router).await;
    assert_eq!(server.get("/").await.text, "mine");
    let page = server.get("/nexus/docs").await;
    assert_eq!(page.status, 200);
    assert!(
        page.header("content-security-policy")
            .starts_with("default-src 'none'; script-src 'self'")
    );
    for asset in ["docs.js", "docs.css", "openapi.json"] {
        assert!(page.text.contains(&format!("\"{asset}\"")), "{asset}");
        let asset = server.get(&format!("/nexus/{asset}")).await;
        assert_eq!(asset.status, 200);
        assert!(!asset.text.contains("http://") && !asset.text.contains("https://"));
    }
    assert!(!page.text.contains("://"), "{}", page.text);
    server.get("/nexus/nodes").await.ok();
    app.shutdown().await;
}
