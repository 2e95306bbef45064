//! Dead letters and scheduled tasks are steered.

use nexus::{client::Scope, testing::TestApp};
use serde_json::{Value, json};

use crate::server::{OrderPaid, Server, shop};

/// Three dead letters of group `books`, by their ids.
async fn with_letters() -> (TestApp, Server, Vec<i64>) {
    let (app, server) = shop().await;
    for order in 7..10 {
        let paid = OrderPaid { order, amount: 1.0 };
        app.client().emit(&paid).await.unwrap();
    }
    app.settled().await;
    let letters = letters(&server).await;
    let ids: Vec<i64> = letters
        .iter()
        .map(|letter| letter["deadLetterId"].as_i64().unwrap())
        .collect();
    assert_eq!(ids.len(), 3);
    (app, server, ids)
}

async fn letters(server: &Server) -> Vec<Value> {
    let shown = server.get("/dead-letters?group=books").await.ok();
    shown.as_array().unwrap().clone()
}

#[tokio::test]
async fn dead_letters_are_redriven() {
    let (app, server, ids) = with_letters().await;
    let token = app
        .client()
        .create_token("ada", &[Scope::Operate], None)
        .await
        .unwrap();
    let read = app
        .client()
        .create_token("read", &[Scope::Read], None)
        .await
        .unwrap();
    let (ada, server) = (
        server.with_token(&token.text),
        server.with_token(&read.text),
    );

    let all = json!({ "which": { "all": true }, "dryRun": true });
    let plan = ada.post("/dead-letters/books/redrive", &all).await.ok();
    assert_eq!(
        (&plan["messages"], &plan["isDryRun"]),
        (&json!(3), &json!(true))
    );
    assert_eq!(letters(&server).await.len(), 3, "nothing was changed");

    let some = json!({ "which": { "ids": [ids[0], 0] } });
    let done = ada.post("/dead-letters/books/redrive", &some).await.ok();
    assert_eq!(
        (&done["messages"], &done["missing"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(done["handlers"][0]["handler"], "book");
    app.settled().await;
    // It has failed again, and tells of the redrive.
    let letters_now = letters(&server).await;
    assert_eq!(letters_now.len(), 3);
    let redriven: Vec<_> = letters_now
        .iter()
        .filter(|letter| letter["redriven"] == 1)
        .collect();
    assert_eq!(redriven.len(), 1);
    assert_eq!(redriven[0]["redrives"][0]["by"], "ada");

    // With a payload that the handler takes, it is gone.
    let path = format!("/dead-letters/books/{}/redrive", ids[1]);
    let wrong = json!({ "payload": { "order": 1_000, "amount": "much" } });
    let problem = ada.post(&path, &wrong).await.problem(422, "payload");
    assert_eq!(problem["errors"][0]["path"], "amount");
    let right = json!({ "payload": { "order": 1_000, "amount": 1.0 }, "by": "bob" });
    let done = ada.post(&path, &right).await.ok();
    assert_eq!(done["messages"], 1);
    app.settled().await;
    assert_eq!(letters(&server).await.len(), 2);
    ada.post(&path, &right).await.problem(404, "not-found");
    ada.post(&path, &json!({})).await.problem(404, "not-found");
    app.shutdown().await;
}

#[tokio::test]
async fn dead_letters_are_purged() {
    let (app, server, ids) = with_letters().await;
    let path = "/dead-letters/books/purge";
    let plan = server
        .post(path, &json!({ "which": { "all": true }, "dryRun": true }))
        .await
        .ok();
    assert_eq!(plan, json!({ "deadLetters": 3, "isDryRun": true }));
    let none = json!({ "which": { "olderThanSeconds": 3600, "handler": "book" } });
    let done = server.post(path, &none).await.ok();
    assert_eq!(done, json!({ "deadLetters": 0, "isDryRun": false }));
    let done = server
        .post(path, &json!({ "which": { "ids": [ids[0]] } }))
        .await
        .ok();
    assert_eq!(done["deadLetters"], 1);
    let rest = json!({ "which": { "newerThanSeconds": 3600, "eventType": "order.paid" } });
    let done = server.post(path, &rest).await.ok();
    assert_eq!(done["deadLetters"], 2);
    assert!(letters(&server).await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn who_says_nothing_of_which_letters_touches_none() {
    let (app, server, ids) = with_letters().await;
    for (status, kind, body) in [
        (422, "invalid", json!({})),
        (422, "invalid", json!({ "which": {} })),
        (422, "invalid", json!({ "which": { "all": false } })),
        (
            422,
            "invalid",
            json!({ "which": { "all": true, "ids": ids } }),
        ),
        (422, "invalid", json!({ "which": { "handlr": "book" } })),
        (422, "invalid", json!({ "all": true })),
        (422, "invalid", json!({ "which": { "handler": "\u{0}" } })),
        (
            422,
            "invalid",
            json!({ "which": { "olderThanSeconds": -1 } }),
        ),
        (
            422,
            "invalid",
            json!({ "which": { "olderThanSeconds": 1e300 } }),
        ),
    ] {
        for path in ["/dead-letters/books/purge", "/dead-letters/books/redrive"] {
            server.post(path, &body).await.problem(status, kind);
        }
    }
    let all = json!({ "which": { "all": true } });
    let refused = server.post("/dead-letters/nobody/purge", &all).await;
    refused.problem(404, "not-found");
    let refused = server
        .post(
            "/dead-letters/books/redrive",
            &json!({ "which": { "all": true }, "rate": 0 }),
        )
        .await;
    refused.problem(422, "invalid");
    assert_eq!(letters(&server).await.len(), 3);
    app.shutdown().await;
}

#[tokio::test]
async fn scheduled_tasks_are_paused_resumed_and_run() {
    let (app, server) = shop().await;
    let post = async |what: &str| {
        server
            .post(&format!("/schedules/count_stock/{what}"), &json!(null))
            .await
    };
    let paused = post("pause").await.ok();
    assert!(paused["pausedAt"].is_string(), "{paused}");
    assert_eq!(paused["nextRunAt"], Value::Null);
    let resumed = post("resume").await.ok();
    assert_eq!(resumed["pausedAt"], Value::Null);
    assert_eq!(
        server.get("/schedules/count_stock/history").await.ok(),
        json!([])
    );

    let run = post("run").await.ok();
    app.settled().await;
    let history = server.get("/schedules/count_stock/history").await.ok();
    assert_eq!(history.as_array().unwrap().len(), 1);
    assert_eq!(history[0]["eventId"], run["eventId"]);
    assert_eq!(history[0]["isManual"], true);
    assert_eq!(app.attempts("count_stock").len(), 1);
    for what in ["pause", "resume", "run"] {
        let path = format!("/schedules/nothing/{what}");
        server
            .post(&path, &json!(null))
            .await
            .problem(404, "not-found");
    }
    app.shutdown().await;
}

#[tokio::test]
async fn groups_are_paused_and_resumed() {
    let (app, server) = shop().await;
    let groups = server.get("/groups").await.ok();
    let name = groups[0]["group"].as_str().unwrap().to_owned();
    let post = async |what: &str| {
        let path = format!("/groups/{name}/{what}");
        server.post(&path, &json!(null)).await.ok()
    };
    let paused = post("pause").await;
    assert_eq!(paused["group"], json!(name));
    assert!(paused["pausedAt"].is_string(), "{paused}");
    assert_eq!(post("pause").await["pausedAt"], paused["pausedAt"]);
    assert_eq!(post("resume").await["pausedAt"], Value::Null);
    for what in ["pause", "resume"] {
        let path = format!("/groups/nothing/{what}");
        let answer = server.post(&path, &json!(null)).await;
        answer.problem(404, "not-found");
    }
    app.shutdown().await;
}
