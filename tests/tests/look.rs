//! Looking at who runs, at what was emitted and what became of it, and at what waits; emitting what fits its
//! registered schema.

use std::time::Duration;

use nexus::{
    Database,
    client::{
        ConnectError, Delivery, DeliveryState, Depth, Group, LoggedEvent, OperateError,
        PayloadError,
    },
    jiff::Timestamp,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use serde_json::json;

/// A parcel that left.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.sent", version = 2, key = parcel)]
struct ParcelSent {
    parcel: u32,
}

/// A parcel that nobody finds.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.lost", key = parcel)]
struct ParcelLost {
    parcel: u32,
}

/// Every parcel gets lost.
#[handler(group = "pessimists")]
async fn lose(sent: ParcelSent) -> Emit<ParcelLost> {
    Emit(ParcelLost {
        parcel: sent.parcel,
    })
}

/// Whoever cannot read it never will.
#[handler(group = "readers")]
async fn refuse(_sent: ParcelSent) -> nexus::Result {
    Err(Error::permanent("the label is wet"))
}

/// Tries again much later.
#[handler(group = "readers", backoff = "fixed(1h)")]
async fn stumble(_sent: ParcelSent) -> nexus::Result {
    Err("the scanner is off".into())
}

fn ids(events: &[LoggedEvent]) -> Vec<i64> {
    events.iter().map(|event| event.event_id).collect()
}

#[tokio::test]
async fn nodes_are_listed_with_what_they_can_run_until_they_stop() {
    let database = TestDatabase::new().await;
    let app = TestApp::start_on(&database, App::discover().only(["lose"])).await;
    let client = app.client().clone();
    let nodes = client.nodes().await.unwrap();
    let [node] = &nodes[..] else {
        panic!("one node runs, not {nodes:?}");
    };
    assert!(node.is_live);
    assert!(node.started_at <= node.last_heartbeat);
    let [handler] = &node.handlers[..] else {
        panic!("it can run one handler, not {:?}", node.handlers);
    };
    assert_eq!(
        (handler.group.as_str(), handler.handler.as_str()),
        ("pessimists", "lose")
    );
    assert_eq!(
        (handler.event_type.as_str(), handler.event_version),
        ("parcel.sent", 2)
    );

    // One that died stays, and is not live.
    sqlx::query(
        "insert into core.nodes (node_id, namespace, app, last_heartbeat)
         select 'dead', namespace, 'another', core.now() - interval '1 minute' from core.nodes",
    )
    .execute(client.pool())
    .await
    .unwrap();
    let nodes = client.nodes().await.unwrap();
    let live: Vec<_> = nodes.iter().map(|node| (&*node.id, node.is_live)).collect();
    assert!(live.contains(&("dead", false)), "{live:?}");
    assert_eq!(live.len(), 2, "{live:?}");
    assert_eq!(client.reap_nodes().await.unwrap(), ["dead"]);
    let nodes = client.nodes().await.unwrap();
    assert!(nodes.len() == 1 && nodes[0].is_live, "{nodes:?}");
    app.shutdown().await;
}

#[tokio::test]
async fn events_are_found_by_what_they_are() {
    let database = TestDatabase::new().await;
    let app = TestApp::start_on(&database, App::discover().only(["lose"])).await;
    let client = app.client();
    let before = Timestamp::now() - Duration::from_hours(1);
    let mut sent = Vec::new();
    for parcel in 0..5 {
        sent.push(client.emit(&ParcelSent { parcel }).await.unwrap());
    }
    app.drained().await;

    let all = client.events().list(100).await.unwrap();
    assert_eq!(all.len(), 10);
    assert!(
        ids(&all).is_sorted_by(|one, next| one > next),
        "{:?}",
        ids(&all)
    );
    let of_type = client.events().event_type("parcel.sent");
    let of_type = of_type.list(100).await.unwrap();
    assert_eq!(
        ids(&of_type),
        sent.iter().rev().copied().collect::<Vec<_>>()
    );
    assert_eq!(of_type[0].event_version, 2);
    assert_eq!(of_type[0].payload["parcel"], 4);

    // Page by page.
    let mut pages = Vec::new();
    let mut query = client.events();
    loop {
        let page = query.list(3).await.unwrap();
        let Some(last) = page.last() else { break };
        query = client.events().before_id(last.event_id);
        pages.extend(ids(&page));
    }
    assert_eq!(pages, ids(&all));

    // What followed from one of them.
    let chain = client.events().correlation_id(sent[2].to_string());
    let chain = chain.list(100).await.unwrap();
    let [lost, first] = &chain[..] else {
        panic!("two events belong together, not {chain:?}");
    };
    assert_eq!(first.event_id, sent[2]);
    assert_eq!(lost.event_type, "parcel.lost");
    assert_eq!(lost.causation_id, Some(sent[2].to_string()));
    let of_key = client.events().key("2").list(100).await.unwrap();
    assert_eq!(ids(&of_key), ids(&chain));

    for (query, expected) in [
        (client.events().since(before), 10),
        (client.events().until(before), 0),
    ] {
        assert_eq!(query.list(100).await.unwrap().len(), expected);
    }

    let event = client.event(sent[2]).await.unwrap().unwrap();
    assert_eq!(event.key.as_deref(), Some("2"));
    assert!(client.event(i64::MAX).await.unwrap().is_none());
    app.shutdown().await;
}

#[tokio::test]
async fn the_oldest_come_first_if_asked_and_pages_lead_on() {
    let database = TestDatabase::new().await;
    let app = TestApp::start_on(&database, App::discover().only(["lose"])).await;
    let client = app.client();
    for parcel in 0..3 {
        client.emit(&ParcelSent { parcel }).await.unwrap();
    }
    app.drained().await;
    let mut all = ids(&client.events().list(100).await.unwrap());
    all.reverse();
    let first = client.events().oldest_first().list(4).await.unwrap();
    assert_eq!(ids(&first), all[..4]);
    let rest = client.events().oldest_first().after_id(all[3]);
    assert_eq!(ids(&rest.list(4).await.unwrap()), all[4..]);
    app.shutdown().await;
}

#[tokio::test]
async fn whoever_follows_the_log_misses_no_transaction_that_was_open_for_long() {
    let app = TestApp::without_workers(App::discover().only(["lose"])).await;
    let client = app.client();
    client.emit(&ParcelSent { parcel: 0 }).await.unwrap();
    let mut tail = client
        .events()
        .event_type("parcel.sent")
        .tail()
        .await
        .unwrap();
    assert!(tail.next(10).await.unwrap().is_empty());

    let mut slow = client.begin().await.unwrap();
    let early = client.emit_in(&mut slow, &ParcelSent { parcel: 1 }).await;
    let early = early.unwrap();
    let mut late = Vec::new();
    for parcel in 2..5 {
        late.push(client.emit(&ParcelSent { parcel }).await.unwrap());
    }
    client.emit(&ParcelLost { parcel: 9 }).await.unwrap();
    assert!(late.iter().all(|id| *id > early));
    // Page by page, with an event in between that belongs behind them.
    let mut told = ids(&tail.next(2).await.unwrap());
    late.push(client.emit(&ParcelSent { parcel: 5 }).await.unwrap());
    loop {
        let page = tail.next(2).await.unwrap();
        if page.is_empty() {
            break;
        }
        told.extend(ids(&page));
    }
    assert_eq!(told, late);

    slow.commit().await.unwrap();
    assert_eq!(ids(&tail.next(2).await.unwrap()), [early]);
    assert!(tail.next(2).await.unwrap().is_empty());
    app.shutdown().await;
}

/// Each look falls into the middle of other transactions: their beginning, and their commit.
#[tokio::test]
async fn whoever_follows_the_log_is_told_of_each_event_once_however_many_commit() {
    const EMITTERS: u32 = 4;
    const EVENTS: u32 = 500;
    let app = TestApp::without_workers(App::discover().only(["lose"])).await;
    let client = app.client();
    let mut tail = client.events().tail().await.unwrap();
    let emitters: Vec<_> = (0..EMITTERS)
        .map(|emitter| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut emitted = Vec::new();
                for number in 0..EVENTS {
                    let parcel = emitter * EVENTS + number;
                    emitted.push(client.emit(&ParcelSent { parcel }).await.unwrap());
                }
                emitted
            })
        })
        .collect();
    let mut told = Vec::new();
    while !emitters.iter().all(tokio::task::JoinHandle::is_finished) {
        told.extend(ids(&tail.next(100).await.unwrap()));
    }
    let mut emitted = Vec::new();
    for emitter in emitters {
        emitted.extend(emitter.await.unwrap());
    }
    loop {
        let page = tail.next(100).await.unwrap();
        if page.is_empty() {
            break;
        }
        told.extend(ids(&page));
    }
    told.sort_unstable();
    emitted.sort_unstable();
    let lost: Vec<&i64> = emitted.iter().filter(|id| !told.contains(id)).collect();
    assert!(
        lost.is_empty(),
        "{} of {} were not told of",
        lost.len(),
        emitted.len()
    );
    assert_eq!(told, emitted);
    app.shutdown().await;
}

fn of<'a>(deliveries: &'a [Delivery], handler: &str) -> &'a Delivery {
    let mut found = deliveries
        .iter()
        .filter(|delivery| delivery.handler == handler);
    match (found.next(), found.next()) {
        (Some(delivery), None) => delivery,
        _ => panic!("one delivery is to {handler} in {deliveries:#?}"),
    }
}

#[tokio::test]
async fn an_event_shows_what_its_handlers_did_with_it() {
    let database = TestDatabase::new().await;
    let early = TestApp::start_on(&database, App::discover().only(["lose"])).await;
    let before = early.client().emit(&ParcelSent { parcel: 1 }).await;
    let before = before.unwrap();
    early.settled().await;
    early.shutdown().await;

    let app = App::discover().only(["lose", "refuse", "stumble"]);
    let app = TestApp::start_on(&database, app).await;
    let client = app.client().clone();
    let event_id = client.emit(&ParcelSent { parcel: 2 }).await.unwrap();
    app.settled().await;
    let all = client.deliveries(&[before, event_id]).await.unwrap();
    let (old, new): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|delivery| delivery.event_id == before);

    assert_eq!(of(&old, "lose").state, DeliveryState::Done);
    // They came later.
    assert_eq!(of(&old, "refuse").state, DeliveryState::NotSent);
    assert_eq!(of(&old, "stumble").state, DeliveryState::NotSent);

    assert_eq!(of(&new, "lose").state, DeliveryState::Done);
    assert_eq!(of(&new, "lose").group, "pessimists");
    let refused = of(&new, "refuse");
    let DeliveryState::DeadLetter { id, error, .. } = &refused.state else {
        panic!("it is a dead letter: {refused:?}");
    };
    let letters = client.dead_letters("readers", 10).await.unwrap();
    assert_eq!(letters[0].id, *id);
    assert!(error.as_deref().unwrap().contains("the label is wet"));
    assert_eq!(refused.attempts, 1);
    let stumbled = of(&new, "stumble");
    let DeliveryState::Waiting { until } = stumbled.state else {
        panic!("it waits for its next attempt: {stumbled:?}");
    };
    assert!(until > client.database_time().await.unwrap() + Duration::from_mins(30));
    assert_eq!(stumbled.attempts, 1);
    assert_eq!(stumbled.errors.len(), 1);
    assert!(stumbled.errors[0].error.contains("the scanner is off"));
    app.shutdown().await;

    // Nobody is there, and everything waits.
    let third = client.emit(&ParcelSent { parcel: 3 }).await;
    assert!(third.is_err(), "its pool was closed with the app");
    let database = Database::from_url(database.url(), "the test").unwrap();
    let client = Client::attach(&database, "demo").await.unwrap();
    let third = client.emit(&ParcelSent { parcel: 3 }).await.unwrap();
    let deliveries = client.deliveries(&[third]).await.unwrap();
    assert_eq!(deliveries.len(), 3, "{deliveries:#?}");
    for delivery in deliveries {
        assert!(
            matches!(delivery.state, DeliveryState::Ready { .. }),
            "{delivery:?}"
        );
    }
}

fn group<'a>(groups: &'a [Group], name: &str) -> &'a Group {
    let found = groups.iter().find(|group| group.name == name);
    found.unwrap_or_else(|| panic!("group {name} is among {groups:#?}"))
}

#[tokio::test]
async fn what_waits_is_counted_up_to_a_thousand_and_its_age_is_told() {
    let app = App::discover().only(["lose", "refuse"]);
    let app = TestApp::without_workers(app).await;
    let client = app.client();
    let groups = client.groups().await.unwrap();
    assert_eq!(group(&groups, "pessimists").depth, Depth::default());
    assert_eq!(group(&groups, "pessimists").lag(), None);

    let sent: Vec<_> = (0..1_001).map(|parcel| ParcelSent { parcel }).collect();
    client.emit_all(&sent[..1_000]).await.unwrap();
    app.advance(Duration::from_mins(5)).await;
    let groups = client.groups().await.unwrap();
    let pessimists = group(&groups, "pessimists");
    assert_eq!(pessimists.depth.to_string(), "1000");
    assert!(!pessimists.depth.is_more);
    client.emit(&sent[1_000]).await.unwrap();
    // What has failed before waits for its next attempt.
    sqlx::query(
        "update pgmq.q_core_events_demo__readers
         set headers = headers || '{\"attempts\": 2}', vt = core.now() + interval '1 hour'
         where headers ->> 'eventId' <> $1",
    )
    .bind(
        client.events().list(1).await.unwrap()[0]
            .event_id
            .to_string(),
    )
    .execute(app.pool())
    .await
    .unwrap();

    let groups = client.groups().await.unwrap();
    let pessimists = group(&groups, "pessimists");
    assert_eq!(pessimists.depth.to_string(), "1000+");
    assert_eq!(pessimists.failed, 0);
    let [lose] = &pessimists.handlers[..] else {
        panic!("it has one handler: {pessimists:?}");
    };
    assert_eq!(
        (&*lose.name, &*lose.event_type, lose.event_version),
        ("lose", "parcel.sent", Some(2))
    );
    assert!(lose.depth.is_more);
    let lag = lose.lag.unwrap();
    let expected = Duration::from_mins(5)..Duration::from_mins(15);
    assert!(expected.contains(&lag), "{lag:?}");
    assert_eq!(pessimists.lag(), lose.lag);

    let readers = group(&groups, "readers");
    assert!(readers.depth.is_more);
    assert!(readers.failed >= 999, "{readers:?}");
    // Only the last one is ready.
    assert!(
        readers.lag().unwrap() < Duration::from_mins(5),
        "{readers:?}"
    );
    assert_eq!(readers.dead_letters, Depth::default());
    app.shutdown().await;
}

#[tokio::test]
async fn a_payload_without_a_rust_type_is_held_to_the_registered_schema() {
    let app = TestApp::start(App::discover().only(["lose"])).await;
    let client = app.client();
    let declared = client.event_types().await.unwrap();
    let sent = declared
        .iter()
        .find(|declared| declared.event_type == "parcel.sent")
        .unwrap();
    assert_eq!(sent.version, 2);
    assert_eq!(sent.schema["properties"]["parcel"]["type"], "integer");

    let payload = json!({ "parcel": 7 });
    let emission = client.emit_json("parcel.sent", None, &payload);
    let emission = emission
        .await
        .unwrap()
        .event_key("7")
        .correlation_id("tour-1");
    let event_id = emission.await.unwrap();
    app.drained().await;
    let event = client.event(event_id).await.unwrap().unwrap();
    assert_eq!(event.payload, payload);
    assert_eq!((event.event_version, event.key.as_deref()), (2, Some("7")));
    let lost = app.only_emitted::<ParcelLost>().await;
    assert_eq!(lost.parcel, 7);

    let before = client.events().list(100).await.unwrap().len();
    let check = async |event_type: &str, version, payload: serde_json::Value| {
        let emitted = client.emit_json(event_type, version, &payload).await;
        emitted.map(drop).unwrap_err()
    };
    let misfit = check("parcel.sent", Some(2), json!({ "parcel": "seven" })).await;
    assert!(matches!(misfit, PayloadError::Misfit { .. }));
    assert!(misfit.to_string().contains("at `parcel`"), "{misfit}");
    let unknown = check("parcel.sank", None, payload.clone()).await;
    assert!(
        unknown.to_string().contains("declared are parcel.sent"),
        "{unknown}"
    );
    let version = check("parcel.sent", Some(1), payload.clone()).await;
    assert!(version.to_string().ends_with("it has 2"), "{version}");
    // What was checked and dropped was not emitted.
    drop(
        client
            .emit_json("parcel.sent", None, &payload)
            .await
            .unwrap(),
    );
    assert_eq!(client.events().list(100).await.unwrap().len(), before);
    app.shutdown().await;
}

#[tokio::test]
async fn whoever_only_looks_creates_nothing() {
    let test_database = TestDatabase::empty().await;
    let database = Database::from_url(test_database.url(), "the test").unwrap();
    let schema = database.schema().await.unwrap();
    assert_eq!(schema.version(), 0);
    assert!(schema.needed() >= 18);
    let refused = Client::attach(&database, "shop").await.unwrap_err();
    assert!(matches!(refused, ConnectError::Schema(_)), "{refused:?}");
    let pool = test_database.pool().await;
    let schemas = "select count(*) from pg_namespace where nspname in ('core', 'pgmq')";
    let made: i64 = sqlx::query_scalar(schemas).fetch_one(&pool).await.unwrap();
    assert_eq!(made, 0);

    database.migrate().await.unwrap();
    let schema = database.schema().await.unwrap();
    assert_eq!(schema.version(), schema.needed());
    assert!(schema.steps.iter().all(|step| step.applied_at.is_some()));
    let refused = Client::attach(&database, "shop").await.unwrap_err();
    let ConnectError::UnknownNamespace { known, .. } = &refused else {
        panic!("{refused:?}");
    };
    assert!(known.is_empty(), "{known:?}");
    Client::connect(&database, "shop").await.unwrap();
    let client = Client::attach(&database, "shop").await.unwrap();
    let refused = client.dead_letters("none", 1).await.unwrap_err();
    assert!(matches!(refused, OperateError::UnknownGroup { .. }));
    let refused = Client::attach(&database, "Shop").await.unwrap_err();
    assert!(refused.to_string().ends_with("it has shop"), "{refused}");

    let back = schema.needed() - 1;
    assert_eq!(database.migrate_down(back).await.unwrap(), 1);
    assert_eq!(database.schema().await.unwrap().version(), back);
    database.migrate_down(0).await.unwrap();
    assert_eq!(database.schema().await.unwrap().version(), 0);
}
