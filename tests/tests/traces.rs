//! With OpenTelemetry the trace of an emitter goes on in its handlers, and logs say what is being handled.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use futures_util::future::join_all;
use nexus::{Handle, client::DeadLetterFilter, prelude::*, testing::TestDatabase};
use nexus_tests::{Log, until, within};
use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId, TracerProvider as _};
use opentelemetry_sdk::trace::{InMemorySpanExporter, Sampler, SdkTracerProvider, SpanData};
use tokio::sync::{Semaphore, mpsc};
use tracing::Instrument as _;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// A letter was posted.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "letter.posted")]
struct LetterPosted {
    number: i64,
}

/// A letter was sorted.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "letter.sorted")]
struct LetterSorted {
    number: i64,
    how: String,
}

/// What a handler read as its trace.
type Saw = mpsc::UnboundedSender<(i64, String, Option<String>)>;

/// Emits in every way that there is.
#[handler(group = "office")]
async fn sort(
    letter: LetterPosted,
    client: Client,
    tx: &mut Tx,
) -> nexus::Result<Emit<LetterSorted>> {
    tracing::info!("sorting");
    let sorted = |how: &str| LetterSorted {
        number: letter.number,
        how: how.to_owned(),
    };
    client.emit(&sorted("client")).await?;
    client.emit_all(&[sorted("all")]).await?;
    let json = serde_json::to_value(sorted("json"))?;
    client
        .emit_json("letter.sorted", None, &json)
        .await?
        .await?;
    tx.emit(&sorted("tx"))?;
    Ok(Emit(sorted("returned")))
}

#[handler(group = "office")]
async fn note(letter: Envelope<LetterSorted>, saw: State<Saw>) {
    let _ = saw.send((
        letter.number,
        letter.how.clone(),
        letter.meta().traceparent().map(str::to_owned),
    ));
}

/// The number of a letter about which there is much to say.
const LONG: i64 = 3;

/// Fails the first time.
#[handler(group = "stamps", backoff = "fixed(5ms)")]
async fn stamp(letter: Envelope<LetterPosted>, saw: State<Saw>) -> nexus::Result {
    if letter.attempt() == 1 {
        let why = "out of stamps".repeat(if letter.number == LONG { 1_000 } else { 1 });
        return Err(why.into());
    }
    let _ = saw.send((letter.number, "stamped".to_owned(), None));
    Ok(())
}

#[handler(group = "lost", max_attempts = 1)]
async fn lose(letter: Envelope<LetterPosted>, saw: State<Saw>) -> nexus::Result {
    let again = letter.is_replayed() || letter.meta().redrive_count() > 0;
    let _ = saw.send((letter.number, again.to_string(), None));
    if again {
        Ok(())
    } else {
        Err("it is gone".into())
    }
}

/// Takes nothing until the gate is open, so that what comes then is a batch.
#[handler(group = "bags")]
async fn bag(letters: Batch<LetterPosted>, gate: State<Arc<Semaphore>>, saw: State<Saw>) {
    let _open = gate.acquire().await;
    for letter in &letters {
        let _ = saw.send((letter.number, letters.len().to_string(), None));
    }
}

/// What this program's spans and logs become. One for all tests of it, which tell theirs by the trace or the
/// number of the letter.
static EXPORTED: LazyLock<(InMemorySpanExporter, Log)> = LazyLock::new(|| {
    let exporter = InMemorySpanExporter::default();
    let tracer = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .build()
        .tracer("traces");
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::registry()
        .with(tracing_subscriber::EnvFilter::new("info"))
        .with(tracing_opentelemetry::layer().with_tracer(tracer))
        .with(
            tracing_subscriber::fmt::layer()
                .with_ansi(false)
                .with_writer(move || writer.clone()),
        )
        .init();
    (exporter, log)
});

struct Test {
    _database: TestDatabase,
    node: Handle,
    gate: Arc<Semaphore>,
    saw: mpsc::UnboundedReceiver<(i64, String, Option<String>)>,
}

impl Test {
    async fn start<'a>(handlers: impl IntoIterator<Item = &'a str>) -> Self {
        LazyLock::force(&EXPORTED);
        let database = TestDatabase::new().await;
        let (sender, saw) = mpsc::unbounded_channel::<(i64, String, Option<String>)>();
        let gate = Arc::new(Semaphore::new(0));
        let app = App::discover()
            .only(handlers)
            .idle_poll(Duration::from_millis(25))
            .database_url(database.url())
            .state(sender)
            .state(Arc::clone(&gate));
        Self {
            node: nexus::start(app).await.unwrap(),
            _database: database,
            gate,
            saw,
        }
    }

    /// Emits a letter in a span of its own.
    async fn post(&self, number: i64) -> SpanOfTest {
        let span = tracing::info_span!("post", number);
        let emit = async { self.node.client().emit(&LetterPosted { number }).await };
        emit.instrument(span.clone()).await.unwrap();
        SpanOfTest::of(&span)
    }

    async fn next(&mut self) -> (i64, String, Option<String>) {
        within("a handler runs", self.saw.recv()).await.unwrap()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SpanOfTest {
    trace: TraceId,
    id: SpanId,
}

impl SpanOfTest {
    fn of(span: &tracing::Span) -> Self {
        use opentelemetry::trace::TraceContextExt as _;
        let context = span.context();
        let span = context.span().span_context().clone();
        assert!(span.is_valid());
        Self {
            trace: span.trace_id(),
            id: span.span_id(),
        }
    }
}

/// The spans that have ended so far of a handler in a trace, in the order in which they began.
fn spans(handler: &str, trace: TraceId) -> Vec<SpanData> {
    let name = format!("handle {handler}");
    let mut spans = EXPORTED.0.get_finished_spans().unwrap();
    spans.retain(|span| span.name == name && span.span_context.trace_id() == trace);
    spans.sort_by_key(|span| span.start_time);
    spans
}

async fn ended(handler: &str, trace: TraceId, count: usize) -> Vec<SpanData> {
    until("the spans have ended", || async {
        Some(spans(handler, trace)).filter(|spans| spans.len() >= count)
    })
    .await
}

/// The spans of a handler that have a link into the trace.
async fn linked(handler: &str, to: SpanOfTest, count: usize) -> Vec<SpanData> {
    let name = format!("handle {handler}");
    until("the linked spans have ended", || async {
        let mut spans = EXPORTED.0.get_finished_spans().unwrap();
        spans.retain(|span| {
            let is_linked = |link: &opentelemetry::trace::Link| {
                let context = &link.span_context;
                context.trace_id() == to.trace && context.span_id() == to.id
            };
            span.name == name && span.links.iter().any(is_linked)
        });
        (spans.len() >= count).then_some(spans)
    })
    .await
}

fn attribute(span: &SpanData, name: &str) -> String {
    let found = span
        .attributes
        .iter()
        .find(|pair| pair.key.as_str() == name);
    found.map_or_else(
        || panic!("no {name} in {:?}", span.attributes),
        |pair| pair.value.to_string(),
    )
}

#[tokio::test]
async fn a_trace_goes_on_in_handlers_and_in_those_of_what_they_emit() {
    let mut test = Test::start(["sort", "note"]).await;
    let posted = test.post(1).await;
    let sorted = ended("sort", posted.trace, 1).await;
    let [sorted] = &sorted[..] else {
        panic!("{sorted:#?}");
    };
    assert_eq!(sorted.parent_span_id, posted.id);
    assert!(sorted.parent_span_is_remote);
    assert_eq!(sorted.span_kind, SpanKind::Consumer);
    assert_eq!(sorted.status, Status::Unset);
    for (name, value) in [
        ("messaging.system", "nexus"),
        ("messaging.operation.type", "process"),
        ("messaging.destination.name", "letter.posted"),
        ("messaging.consumer.group.name", "office"),
        ("attempt", "1"),
    ] {
        assert_eq!(attribute(sorted, name), value, "{name}");
    }
    let id = sorted.span_context.span_id();
    let parent = format!("00-{}-{id}-01", posted.trace);
    let mut seen = Vec::new();
    for _ in 0..5 {
        let (number, how, traceparent) = test.next().await;
        assert_eq!((number, traceparent.as_ref()), (1, Some(&parent)), "{how}");
        seen.push(how);
    }
    seen.sort_unstable();
    assert_eq!(seen, ["all", "client", "json", "returned", "tx"]);
    for noted in ended("note", posted.trace, 5).await {
        assert_eq!(noted.parent_span_id, id);
    }
    test.node.shutdown().await;
}

#[tokio::test]
async fn each_attempt_is_a_span_that_says_how_it_failed() {
    let mut test = Test::start(["stamp"]).await;
    let posted = test.post(2).await;
    test.next().await;
    let attempts = ended("stamp", posted.trace, 2).await;
    let [failed, done] = &attempts[..] else {
        panic!("{attempts:#?}");
    };
    assert_eq!(failed.status, Status::error("out of stamps"));
    assert_eq!(done.status, Status::Unset);
    for (attempt, span) in ["1", "2"].into_iter().zip(&attempts) {
        assert_eq!(span.parent_span_id, posted.id);
        assert_eq!(attribute(span, "attempt"), attempt);
    }
    test.node.shutdown().await;
}

#[tokio::test]
async fn a_span_says_as_much_of_an_error_as_a_dead_letter_does() {
    let mut test = Test::start(["stamp"]).await;
    let posted = test.post(LONG).await;
    test.next().await;
    let Status::Error { description } = &ended("stamp", posted.trace, 2).await[0].status else {
        panic!("it failed");
    };
    assert!(description.starts_with("out of stampsout"), "{description}");
    assert!(description.ends_with('…'), "{description}");
    assert_eq!(description.chars().count(), 2_001);
    test.node.shutdown().await;
}

#[tokio::test]
async fn a_batch_is_linked_to_each_emitter() {
    let mut test = Test::start(["bag"]).await;
    // At the same time, so that one claim finds several.
    let posted = join_all((100..110).map(|number| test.post(number))).await;
    test.gate.add_permits(1_000);
    let mut lengths = std::collections::BTreeMap::new();
    for _ in &posted {
        let (number, length, _) = test.next().await;
        lengths.insert(number, length);
    }
    assert!(
        lengths.values().any(|length| length != "1"),
        "no batch came"
    );
    for (emitter, length) in posted.into_iter().zip(lengths.into_values()) {
        if length == "1" {
            assert_eq!(
                ended("bag", emitter.trace, 1).await[0].parent_span_id,
                emitter.id
            );
        } else {
            let [span] = &linked("bag", emitter, 1).await[..] else {
                panic!("more than one");
            };
            assert_eq!(attribute(span, "messaging.batch.message_count"), length);
            assert_ne!(span.span_context.trace_id(), emitter.trace);
        }
    }
    test.node.shutdown().await;
}

#[tokio::test]
async fn what_is_delivered_once_more_has_a_trace_of_its_own() {
    let mut test = Test::start(["lose"]).await;
    let posted = test.post(3).await;
    let client = test.node.client().clone();
    assert_eq!(test.next().await, (3, "false".to_owned(), None));
    assert_eq!(
        ended("lose", posted.trace, 1).await[0].parent_span_id,
        posted.id
    );
    until("the dead letter is there", || async {
        let redriven = client
            .redrive("lost", DeadLetterFilter::new())
            .await
            .unwrap();
        (redriven.messages == 1).then_some(())
    })
    .await;
    assert_eq!(test.next().await, (3, "true".to_owned(), None));
    client.replay("lost").handler("lose").start().await.unwrap();
    assert_eq!(test.next().await, (3, "true".to_owned(), None));
    for span in linked("lose", posted, 2).await {
        assert_eq!(span.parent_span_id, SpanId::INVALID);
        assert_ne!(span.span_context.trace_id(), posted.trace);
    }
    test.node.shutdown().await;
}

#[tokio::test]
async fn a_trace_that_is_not_sampled_is_passed_on_and_not_recorded() {
    let mut test = Test::start(["sort", "note"]).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-00");
    let letter = LetterPosted { number: 4 };
    let emission = test.node.client().emit(&letter);
    emission.traceparent(parent).await.unwrap();
    for _ in 0..5 {
        let (_, how, traceparent) = test.next().await;
        let traceparent = traceparent.unwrap();
        let is_of_trace = traceparent.starts_with(&format!("00-{trace}-"));
        assert!(
            is_of_trace && traceparent.ends_with("-00"),
            "{how}: {traceparent}"
        );
    }
    assert!(spans("sort", TraceId::from_hex(trace).unwrap()).is_empty());
    test.node.shutdown().await;
}

#[tokio::test]
async fn a_line_of_the_log_says_what_is_being_handled() {
    let mut test = Test::start(["sort", "note"]).await;
    let event_id = test
        .node
        .client()
        .emit(&LetterPosted { number: 5 })
        .await
        .unwrap();
    for _ in 0..5 {
        test.next().await;
    }
    let log = EXPORTED.1.text();
    let fields = format!(
        "group=\"office\" handler=\"sort\" event_type=\"letter.posted\" event_id={event_id} attempt=1"
    );
    assert!(
        log.lines()
            .any(|line| line.contains(&fields) && line.ends_with("sorting")),
        "no line with {fields} in\n{log}"
    );
    test.node.shutdown().await;
}
