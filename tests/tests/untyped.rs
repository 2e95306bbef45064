//! Handlers of event types that are known only at run time: they are delivered, retried, dead-lettered and found again
//! after a restart as those of a macro, and what does not fit is refused before anything runs.

use std::time::Duration;

use nexus::{
    UntypedHandler,
    prelude::*,
    testing::{TestApp, TestDatabase, TestEnvelope},
};
use nexus_tests::within;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// A visit, which the program knows as a type as well.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "page.visited", key = page)]
struct PageVisited {
    page: String,
}

#[handler(group = "visits")]
async fn count(_visited: PageVisited) {}

type Saw = mpsc::UnboundedSender<(u32, Value)>;

/// Tells what it is given, and then does what the payload says.
fn obedient(event_type: &str, name: &str, saw: Saw) -> UntypedHandler {
    UntypedHandler::new(event_type, name, move |event: Envelope<Value>, ctx: Ctx| {
        let saw = saw.clone();
        assert!(
            event["say"] != "panic at once",
            "before anything is awaited"
        );
        async move {
            let _ = saw.send((ctx.attempt(), event.event().clone()));
            match event["say"].as_str() {
                Some("fail once") if ctx.attempt() == 1 => Err("failed once".into()),
                Some("fail") => Err(format!("failure {}", ctx.attempt()).into()),
                Some("panic") => panic!("did not expect this"),
                _ => Ok(()),
            }
        }
    })
    .group("audit")
    .max_attempts(3)
    .backoff(Duration::from_millis(10), Duration::from_millis(10))
}

#[tokio::test]
async fn it_is_delivered_retried_and_dead_lettered_like_any_other() {
    let (sender, mut saw) = mpsc::unbounded_channel();
    let app = App::discover().handle(obedient("page.visited", "listen", sender));
    let app = TestApp::start(app).await;
    let client = app.client();
    // Any JSON, emitted with and without the Rust type, and by SQL.
    let typed = PageVisited {
        page: "start".to_owned(),
    };
    client.emit(&typed).await.unwrap();
    assert_eq!(
        within("a call", saw.recv()).await,
        Some((1, json!({"page": "start"})))
    );
    for payload in [json!([1, null, "ä"]), json!("text"), json!(null)] {
        sqlx::query("select core.emit($1, 'page.visited', $2)")
            .bind(client.namespace())
            .bind(payload.to_string().parse::<Value>().unwrap())
            .execute(app.pool())
            .await
            .unwrap();
        assert_eq!(within("a call", saw.recv()).await, Some((1, payload)));
    }
    app.drained().await;
    // `count` could not decode these three.
    let letters = app.dead_letters().await;
    assert_eq!(letters.len(), 3);
    assert!(
        letters
            .iter()
            .all(|letter| letter.handler.as_deref() == Some("count"))
    );

    let say = |text: &str| json!({"page": "x", "say": text});
    let emit = async |payload: Value| {
        let emission = client.emit_json("page.visited", None, &payload);
        emission.await.unwrap().await.unwrap()
    };
    emit(say("fail once")).await;
    for attempt in 1..=2 {
        assert_eq!(
            within("a call", saw.recv()).await,
            Some((attempt, say("fail once")))
        );
    }
    let failing = emit(say("fail")).await;
    let panicking = emit(say("panic")).await;
    let at_once = emit(say("panic at once")).await;
    app.drained().await;
    let mut letters = app.dead_letters().await;
    letters.retain(|letter| letter.handler.as_deref() == Some("listen"));
    letters.sort_by_key(|letter| letter.event_id);
    let told: Vec<_> = letters
        .iter()
        .map(|letter| (letter.event_id, letter.group.as_str(), letter.attempts))
        .collect();
    assert_eq!(
        told,
        [failing, panicking, at_once].map(|event_id| (Some(event_id), "audit", 3))
    );
    assert!(
        letters[0].error.as_deref().unwrap().contains("failure 3"),
        "{letters:#?}"
    );
    assert!(
        letters[1]
            .error
            .as_deref()
            .unwrap()
            .contains("the handler panicked: did not expect this"),
        "{letters:#?}"
    );
}

#[tokio::test]
async fn what_is_emitted_while_it_is_away_waits_for_it() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let app = || {
        App::discover()
            .only(["listen"])
            .handle(obedient("any.thing", "listen", sender.clone()))
    };
    let first = TestApp::start_on(&database, app()).await;
    let client = first.client().clone();
    client
        .emit_undeclared("any.thing", 1, &json!({"n": 1}))
        .unwrap()
        .await
        .unwrap();
    assert_eq!(
        within("a call", saw.recv()).await,
        Some((1, json!({"n": 1})))
    );
    first.settled().await;
    first.shutdown().await;

    let pool = database.pool().await;
    sqlx::query("select core.emit('demo', 'any.thing', '{\"n\": 2}')")
        .execute(&pool)
        .await
        .unwrap();
    let second = TestApp::start_on(&database, app()).await;
    assert_eq!(
        within("a call", saw.recv()).await,
        Some((1, json!({"n": 2})))
    );
    second.settled().await;
    // Of another version it takes nothing: there is nobody else, so it waits.
    second
        .client()
        .emit_undeclared("any.thing", 2, &json!({"n": 3}))
        .unwrap()
        .await
        .unwrap();
    let schemas = second.client().event_types().await.unwrap();
    assert!(schemas.is_empty(), "no schema is made up: {schemas:?}");
    let subscriptions = second.client().subscriptions().await.unwrap();
    assert_eq!(
        (subscriptions[0].waiting, subscriptions[0].unserved),
        (1, 1)
    );
    assert!(saw.try_recv().is_err());
}

#[tokio::test]
async fn it_can_be_run_alone_and_is_described() {
    let (sender, mut saw) = mpsc::unbounded_channel();
    let handler = obedient("any.thing", "listen", sender);
    let app = App::discover().only(["listen"]).handle(handler);
    let description = app.describe();
    let listen = &description.handlers[0];
    assert_eq!(
        (listen.name.as_str(), listen.group.as_str()),
        ("listen", "audit")
    );
    assert_eq!(
        (listen.event_type.as_str(), listen.event_version),
        ("any.thing", 1)
    );
    assert_eq!((listen.max_attempts, listen.backoff.max_ms), (3, 10));
    assert!(listen.source.file.ends_with("untyped.rs"), "{listen:?}");
    assert_eq!(listen.source.crate_name, "untyped");
    assert!(description.events.is_empty());

    let app = TestApp::without_workers(app).await;
    let envelope = TestEnvelope::raw("any.thing", &json!({"say": "fail"})).attempt(3);
    let ran = app.run_handler("listen", envelope).await;
    assert_eq!(ran.error(), Some("failure 3"));
    assert_eq!(saw.try_recv().unwrap().0, 3);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let problems = |handlers: Vec<UntypedHandler>| -> Vec<String> {
        let app = handlers.into_iter().fold(App::discover(), App::handle);
        let Err(problems) = app.validate() else {
            return Vec::new();
        };
        problems.iter().map(ToString::to_string).collect()
    };
    let listen =
        |event_type: &str, name: &str| obedient(event_type, name, mpsc::unbounded_channel().0);
    let of_app = |event_type: &str, name: &str| {
        UntypedHandler::new(event_type, name, |_, _| async { Ok(()) }).group("visits")
    };
    // A name of a macro's handler, and one that is given twice.
    let found = problems(vec![of_app("page.visited", "count")]);
    assert_eq!(found.len(), 1, "{found:#?}");
    let both = [
        "handler `count` of group `visits` is declared by `untyped::count` (tests/tests/untyped.rs:",
        ") and by `untyped::what_does_not_fit_is_refused_before_anything_runs::",
    ];
    assert!(
        both.iter().all(|part| found[0].contains(part)),
        "{found:#?}"
    );
    let found = problems(vec![listen("a.b", "listen"), listen("a.c", "listen")]);
    assert!(
        found[0].starts_with("handler `listen` of group `audit` is declared by `untyped::"),
        "{found:#?}"
    );
    let found = problems(vec![
        listen("Not a Type", "listen"),
        listen("a.b", "9lives"),
    ]);
    assert!(
        found[0].starts_with("event type `Not a Type` is refused: "),
        "{found:#?}"
    );
    assert!(
        found[1]
            .starts_with("handler `9lives` is refused: it must start with a letter, in `untyped::"),
        "{found:#?}"
    );
    let found = problems(vec![
        listen("tick.shop.clean", "listen")
            .version(0)
            .max_attempts(0)
            .concurrency(0)
            .timeout(Duration::ZERO),
    ]);
    let begins = [
        "handler `listen` takes `tick.shop.clean`, in ",
        "`version` of handler `listen` is not from 1 to 2147483647, in ",
        "`max_attempts` of handler `listen` is not from 1 to 2147483647, in ",
        "`concurrency` of handler `listen` is not from 1 to 2147483647, in ",
        "`timeout` of handler `listen` is not above zero and up to 24 days, in ",
    ];
    for begin in begins {
        assert!(
            found.iter().any(|problem| problem.starts_with(begin)),
            "{begin}: {found:#?}"
        );
    }
}
