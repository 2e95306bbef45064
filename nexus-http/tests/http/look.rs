//! What is shown has the shape that `docs/cli.md` promises.

use nexus::testing::TestApp;
use serde_json::{Value, json};

use crate::server::{OrderPaid, Server, shop};

async fn with_an_order() -> (TestApp, Server, i64) {
    let (app, server) = shop().await;
    let paid = OrderPaid {
        order: 7,
        amount: 3.0,
    };
    let id = app.client().emit(&paid).await.unwrap();
    app.settled().await;
    (app, server, id)
}

fn keys(document: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = document
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

fn sorted(fields: &str) -> Vec<&str> {
    let mut fields: Vec<&str> = fields.split_whitespace().collect();
    fields.sort_unstable();
    fields
}

#[tokio::test]
async fn documents_have_the_fields_of_the_programs() {
    let (app, server, id) = with_an_order().await;
    let event = "eventId eventType eventVersion emittedAt producerNodeId key correlationId causationId payload metadata";
    let letter = "deadLetterId group handler eventId eventType reason error fingerprint attempts errors failedAt \
                  redriven redrives isEdited originalEvent cursor";
    let task = "taskId name app cronExpression timezone eventType eventVersion misfire graceSeconds scheduler isActive \
                pausedAt nextRunAt lastRunAt lastError";
    for (path, place, fields) in [
        ("/events", "/0", event),
        ("/dead-letters", "/0", letter),
        ("/dead-letters?group=books", "/0", letter),
        (
            "/dead-letters/causes",
            "/0",
            "group handler eventType fingerprint deadLetters firstFailedAt lastFailedAt sampleId \
                                        sampleReason sampleError",
        ),
        ("/schedules", "/0", task),
        ("/schedules/count_stock", "", task),
        (
            "/groups",
            "/0",
            "group queue pausedAt messages failed lagSeconds deadLetters handlers",
        ),
        ("/groups", "/0/messages", "counted isMore"),
        (
            "/groups",
            "/0/handlers/0",
            "group handler eventType eventVersion app isLive messages lagSeconds",
        ),
        (
            "/nodes",
            "/0",
            "nodeId app buildId program displayName startedAt lastHeartbeat isLive handlers",
        ),
        (
            "/nodes",
            "/0/handlers/0",
            "group handler eventType eventVersion",
        ),
        ("/schemas", "/0", "eventType version app registeredAt"),
        (
            "/schemas/order.paid",
            "",
            "eventType version app registeredAt schema",
        ),
    ] {
        let shown = server.get(path).await.ok();
        let document = shown
            .pointer(place)
            .unwrap_or_else(|| panic!("{path}: {shown}"));
        assert_eq!(keys(document), sorted(fields), "{path}");
    }
    let shown = server.get(&format!("/events/{id}")).await.ok();
    assert_eq!(keys(&shown), sorted(&format!("{event} deliveries")));
    let deliveries = shown["deliveries"].as_array().unwrap();
    assert_eq!(deliveries.len(), 2);
    assert_eq!(
        keys(&deliveries[0]),
        sorted("group handler attempts errors state deadLetterId reason error failedAt")
    );
    assert_eq!(deliveries[0]["state"], "deadLetter");
    assert_eq!(deliveries[1]["state"], "done");
    let letter = deliveries[0]["deadLetterId"].as_i64().unwrap();
    let letter = server
        .get(&format!("/dead-letters/books/{letter}"))
        .await
        .ok();
    assert_eq!(letter["eventId"], id);
    assert_eq!(letter["reason"], "Permanent error");
    app.shutdown().await;
}

#[tokio::test]
async fn events_are_listed_by_what_they_are() {
    let (app, server, id) = with_an_order().await;
    let types = async |query: &str| {
        let shown = server.get(&format!("/events{query}")).await.ok();
        let events = shown.as_array().unwrap().iter();
        events
            .map(|event| event["eventType"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(types("").await, ["parcel.sent", "order.paid"]);
    assert_eq!(
        types("?oldestFirst=true").await,
        ["order.paid", "parcel.sent"]
    );
    assert_eq!(types("?type=order.paid").await, ["order.paid"]);
    assert_eq!(types("?key=7").await, ["order.paid"]);
    assert_eq!(types(&format!("?correlationId={id}")).await.len(), 2);
    assert_eq!(types("?since=2000-01-01T00:00:00Z").await.len(), 2);
    assert_eq!(types("?until=2000-01-01T00:00:00Z").await.len(), 0);
    app.shutdown().await;
}

#[tokio::test]
async fn pages_lead_to_each_other() {
    let (app, server, _) = with_an_order().await;
    for order in 8..12 {
        let paid = OrderPaid { order, amount: 1.0 };
        app.client().emit(&paid).await.unwrap();
    }
    app.settled().await;
    for (start, name) in [
        ("/events?type=order.paid&limit=2", "eventId"),
        (
            "/events?type=order.paid&limit=2&oldestFirst=true",
            "eventId",
        ),
        ("/dead-letters?group=books&limit=2", "deadLetterId"),
    ] {
        let (mut path, mut seen) = (start.to_owned(), Vec::new());
        loop {
            let page = server.get(&path).await;
            let shown = page.ok();
            seen.extend(
                shown
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|item| item[name].as_i64().unwrap()),
            );
            let link = page.header("link");
            if link.is_empty() {
                break;
            }
            let (query, rel) = link.strip_prefix('<').unwrap().split_once('>').unwrap();
            assert_eq!(rel, "; rel=\"next\"");
            path = format!("{}{query}", start.split('?').next().unwrap());
        }
        let mut once = seen.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!((seen.len(), once.len()), (5, 5), "{start}: {seen:?}");
    }
    app.shutdown().await;
}

#[tokio::test]
async fn what_is_not_there_and_what_cannot_be_asked_is_said() {
    let (app, server, _) = with_an_order().await;
    for path in [
        "/events/0",
        "/events/9223372036854775807",
        "/dead-letters/books/0",
        "/dead-letters/nobody/1",
        "/dead-letters?group=nobody",
        "/schedules/nothing",
        "/schedules/nothing/history",
        "/schemas/nothing",
        "/schemas/order.paid?version=9",
    ] {
        server.get(path).await.problem(404, "not-found");
    }
    for path in [
        "/events/x",
        "/events/9223372036854775808",
        "/events/%00",
        "/events?type=%00",
        "/events?limit=0",
        "/events?limit=1001",
        "/events?limit=-1",
        "/events?since=soon",
        "/events?since=-009999-01-01T00:00:00Z",
        "/events?cursor=x",
        "/events?typo=order.paid",
        "/events?type=a&type=b",
        "/dead-letters?cursor=1-1",
        "/dead-letters?group=books&cursor=x",
        "/dead-letters/books/x",
        "/schedules/count_stock/history?limit=0",
    ] {
        server.get(path).await.problem(400, "request");
    }
    server
        .get("/dead-letters?group=no%20name")
        .await
        .problem(404, "not-found");
    let far = server
        .get("/events?since=9999-12-30T22:00:00Z&until=0001-01-01T00:00:00Z")
        .await;
    assert_eq!(far.ok(), json!([]));
    app.shutdown().await;
}
