//! Who may do what, and who not.

use std::{num::NonZeroU32, time::Duration};

use nexus::{
    Client, Database,
    client::{Scope, TokenError},
    testing::TestApp,
};
use nexus_http::Settings;
use reqwest::Method;
use serde_json::json;

use crate::server::{Server, answer, app, http};

const HOUR: Duration = Duration::from_hours(1);

/// A route of each scope.
async fn try_each(server: &Server) -> [u16; 3] {
    let event = json!({ "eventType": "order.paid", "payload": { "order": 7, "amount": 1 } });
    let purge = json!({ "which": { "all": true } });
    [
        server.post("/events", &event).await.status.as_u16(),
        server.get("/events").await.status.as_u16(),
        server
            .post("/dead-letters/books/purge", &purge)
            .await
            .status
            .as_u16(),
    ]
}

#[tokio::test]
async fn a_token_may_what_its_scopes_say() {
    let app = TestApp::without_workers(app()).await;
    let server = Server::start(app.client(), Settings::new()).await;
    for (scope, expected) in [
        (Scope::Emit, [200, 403, 403]),
        (Scope::Read, [403, 200, 403]),
        (Scope::Operate, [403, 403, 200]),
    ] {
        let created = app
            .client()
            .create_token("t", &[scope], None)
            .await
            .unwrap();
        let server = server.with_token(&created.text);
        assert_eq!(try_each(&server).await, expected, "{scope}");
    }
    let all = [Scope::Operate, Scope::Read, Scope::Emit, Scope::Read];
    let created = app.client().create_token("t", &all, None).await.unwrap();
    assert_eq!(
        created.token.scopes,
        [Scope::Emit, Scope::Operate, Scope::Read]
    );
    let with_token = server.with_token(&created.text);
    assert_eq!(try_each(&with_token).await, [200, 200, 200]);

    let created = app
        .client()
        .create_token("t", &[Scope::Emit], None)
        .await
        .unwrap();
    let refused = server.with_token(&created.text).get("/nodes").await;
    refused.problem(403, "scope");
    assert_eq!(
        refused.header("www-authenticate"),
        "Bearer error=\"insufficient_scope\", scope=\"read\""
    );
    app.shutdown().await;
}

#[tokio::test]
async fn only_tokens_in_force_in_this_namespace_are_taken() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    // For others: this machine needs no token while there is none.
    let server = Server::start_for_others(client, Settings::new()).await;
    let valid = client
        .create_token("valid", &[Scope::Read], None)
        .await
        .unwrap();
    let other = client
        .create_token("other", &[Scope::Read], None)
        .await
        .unwrap();
    server.with_token(&valid.text).get("/nodes").await.ok();

    let (head, secret) = valid.text.rsplit_once('_').unwrap();
    let (_, other_secret) = other.text.rsplit_once('_').unwrap();
    let flipped = if secret.starts_with('0') { "1" } else { "0" };
    let url = Database::from_url(app.database().url(), "the test").unwrap();
    let elsewhere = Client::connect(&url, "elsewhere").await.unwrap();
    let foreign = elsewhere
        .create_token("foreign", &[Scope::Read], None)
        .await
        .unwrap();
    for wrong in [
        String::new(),
        "x".to_owned(),
        valid.token.id.to_string(),
        valid.text.to_uppercase(),
        format!("{head}_"),
        format!("{head}_{other_secret}"),
        format!("{head}_{flipped}{}", &secret[1..]),
        format!("{}0", valid.text),
        valid.text[..valid.text.len() - 1].to_owned(),
        "' or true --".to_owned(),
        foreign.text.clone(),
    ] {
        let refused = server.with_token(&wrong).get("/nodes").await;
        refused.problem(401, "unauthenticated");
        assert_eq!(refused.header("www-authenticate"), "Bearer");
    }
    let basic = server
        .request(Method::GET, "/nodes")
        .basic_auth("u", Some(&valid.text));
    answer(basic).await.problem(401, "unauthenticated");
    server.get("/nodes").await.problem(401, "unauthenticated");
    // Where it belongs it is in force.
    let there = Server::start_for_others(&elsewhere, Settings::new()).await;
    there.with_token(&foreign.text).get("/nodes").await.ok();
    app.shutdown().await;
}

#[tokio::test]
async fn a_token_ends_when_it_is_revoked_or_expires() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    let server = Server::start_for_others(client, Settings::new()).await;
    let short = client
        .create_token("short", &[Scope::Read], Some(HOUR))
        .await
        .unwrap();
    let long = client
        .create_token("long", &[Scope::Read], None)
        .await
        .unwrap();
    let (with_short, with_long) = (
        server.with_token(&short.text),
        server.with_token(&long.text),
    );
    with_short.get("/nodes").await.ok();
    with_long.get("/nodes").await.ok();

    assert!(client.revoke_token(long.token.id).await.unwrap());
    assert!(
        !client.revoke_token(long.token.id).await.unwrap(),
        "it was before"
    );
    with_long
        .get("/nodes")
        .await
        .problem(401, "unauthenticated");
    with_short.get("/nodes").await.ok();
    app.advance(HOUR).await;
    with_short
        .get("/nodes")
        .await
        .problem(401, "unauthenticated");

    let url = Database::from_url(app.database().url(), "the test").unwrap();
    let elsewhere = Client::connect(&url, "elsewhere").await.unwrap();
    assert!(
        !elsewhere.revoke_token(short.token.id).await.unwrap(),
        "it is not theirs"
    );
    assert!(elsewhere.tokens().await.unwrap().is_empty());
    let tokens = client.tokens().await.unwrap();
    assert_eq!(tokens.len(), 2);
    assert_eq!(tokens[0].expires_at, Some(tokens[0].created_at + HOUR));
    assert!(tokens[1].revoked_at.is_some());
    app.shutdown().await;
}

#[tokio::test]
async fn the_last_use_is_noted_once_a_minute() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    app.freeze().await;
    let server = Server::start_for_others(client, Settings::new()).await;
    let created = client
        .create_token("t", &[Scope::Emit], None)
        .await
        .unwrap();
    let server = server.with_token(&created.text);
    let last_use = async || client.tokens().await.unwrap()[0].last_used_at;
    assert_eq!(last_use().await, None);
    // Refused for its scope, it was shown all the same.
    server.get("/nodes").await.problem(403, "scope");
    let first = last_use().await.unwrap();
    app.advance(Duration::from_secs(59)).await;
    server.get("/nodes").await;
    assert_eq!(last_use().await, Some(first));
    let later = app.advance(Duration::from_secs(2)).await;
    server.get("/nodes").await;
    assert_eq!(last_use().await, Some(later));
    app.shutdown().await;
}

#[tokio::test]
async fn a_secret_is_kept_nowhere() {
    let app = TestApp::without_workers(app()).await;
    let created = app
        .client()
        .create_token("t", &[Scope::Read], None)
        .await
        .unwrap();
    let row: String = sqlx::query_scalar("select to_jsonb(t)::text from core.tokens t")
        .fetch_one(app.pool())
        .await
        .unwrap();
    let (_, secret) = created.text.rsplit_once('_').unwrap();
    assert!(row.contains(&created.token.id.to_string()), "{row}");
    assert!(!row.contains(secret), "{row}");
    assert!(!format!("{created:?}").contains(secret));
    app.shutdown().await;
}

#[tokio::test]
async fn tokens_that_make_no_sense_are_not_made() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    for name in ["", "a\0b", "a\nb", &"ä".repeat(101)] {
        let refused = client.create_token(name, &[Scope::Read], None).await;
        assert!(
            matches!(refused, Err(TokenError::Name { .. })),
            "{refused:?}"
        );
    }
    let refused = client.create_token("t", &[], None).await;
    assert!(matches!(refused, Err(TokenError::NoScope)), "{refused:?}");
    let refused = client
        .create_token("t", &[Scope::Read], Some(Duration::MAX))
        .await;
    assert!(
        matches!(refused, Err(TokenError::Lifetime { .. })),
        "{refused:?}"
    );
    client
        .create_token(&"ä".repeat(100), &[Scope::Read], None)
        .await
        .unwrap();
    app.shutdown().await;
}

#[tokio::test]
async fn without_tokens_only_this_machine_is_served() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    let here = Server::start(client, Settings::new()).await;
    let elsewhere = Server::start_for_others(client, Settings::new()).await;
    assert_eq!(try_each(&here).await, [200, 200, 200]);
    assert_eq!(try_each(&elsewhere).await, [401, 401, 401]);
    // Everybody may ask whether the server is well, and for its description.
    for open in [
        "/health",
        "/health/live",
        "/health/ready",
        "/openapi.json",
        "/docs",
        "/docs.js",
        "/docs.css",
    ] {
        assert_eq!(elsewhere.get(open).await.status, 200, "{open}");
    }

    // A page of somebody else in a browser of this machine, a proxy on it.
    for (name, value) in [
        ("origin", "https://example.org"),
        ("host", "example.org"),
        ("x-forwarded-for", "192.0.2.7"),
        ("forwarded", "for=192.0.2.7"),
    ] {
        let request = here.request(Method::GET, "/nodes").header(name, value);
        answer(request).await.problem(401, "unauthenticated");
    }

    // The first token ends it.
    let created = client
        .create_token("t", &[Scope::Read], None)
        .await
        .unwrap();
    assert_eq!(try_each(&here).await, [401, 401, 401]);
    here.with_token(&created.text).get("/nodes").await.ok();
    client.revoke_token(created.token.id).await.unwrap();
    assert_eq!(try_each(&here).await, [200, 200, 200]);
    app.shutdown().await;
}

#[tokio::test]
async fn a_server_that_does_not_know_its_callers_serves_none_without_a_token() {
    let app = TestApp::without_workers(app()).await;
    let router = nexus_http::router(app.client().clone(), Settings::new());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let http = http();
    let url = format!("http://{address}/nodes");
    answer(http.get(&url)).await.problem(401, "unauthenticated");
    let created = app
        .client()
        .create_token("t", &[Scope::Read], None)
        .await
        .unwrap();
    answer(http.get(&url).bearer_auth(created.text)).await.ok();
    app.shutdown().await;
}

#[tokio::test]
async fn a_token_that_asks_too_often_is_told_to_wait() {
    let app = TestApp::without_workers(app()).await;
    let client = app.client();
    let one = NonZeroU32::new(1).unwrap();
    let settings = Settings::new().requests_per_second(one);
    let server = Server::start_for_others(client, settings).await;
    let busy = client
        .create_token("busy", &[Scope::Read], None)
        .await
        .unwrap();
    let calm = client
        .create_token("calm", &[Scope::Read], None)
        .await
        .unwrap();
    let busy = server.with_token(&busy.text);
    // One a second: of ten at once, all but those of the seconds that they take.
    let answers = futures(&busy, 10).await;
    let refused = answers.iter().find(|answer| answer.status == 429).unwrap();
    refused.problem(429, "rate-limit");
    assert_eq!(refused.header("retry-after"), "1");
    assert!(answers.iter().any(|answer| answer.status == 200));
    server.with_token(&calm.text).get("/nodes").await.ok();
    app.shutdown().await;
}

async fn futures(server: &Server, count: usize) -> Vec<crate::server::Answer> {
    let requests = (0..count).map(|_| server.get("/nodes"));
    futures_util::future::join_all(requests).await
}
