//! `nexus events`

mod tree;

use std::{fmt::Write as _, time::Duration};

use clap::{Args, Subcommand};
use nexus::client::{Delivery, LoggedEvent};
use nexus_http::documents;
use serde::Serialize;

use crate::{
    console::{Console, DIM, Table, cut, indented, safe},
    moments::{self, Moment, full, relative},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Events {
    /// List events of the log, the newest first
    List(List),
    /// Show an event, what its handlers did with it, and what it belongs to
    Show(Show),
    /// Show events as they are emitted, until Ctrl-C
    Tail(Tail),
}

/// Which events.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// Only events about this entity
    #[arg(long)]
    key: Option<String>,
    /// Only events with this correlation id
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
}

impl Which {
    fn of<'a>(&self, session: &'a Session) -> nexus::client::Events<'a> {
        let mut events = session.client.events();
        if let Some(event_type) = &self.event_type {
            events = events.event_type(event_type);
        }
        if let Some(key) = &self.key {
            events = events.key(key);
        }
        if let Some(id) = &self.correlation_id {
            events = events.correlation_id(id);
        }
        events
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
No index knows of keys and correlation ids: give --since as well where the log is long.

Example: nexus events list --type order.paid --since 2h --limit 50")]
pub(crate) struct List {
    #[command(flatten)]
    which: Which,
    /// Only events from then on: so long ago, such as 2h, or a time
    #[arg(long, value_name = "WHEN")]
    since: Option<Moment>,
    /// Only events before that
    #[arg(long, value_name = "WHEN")]
    until: Option<Moment>,
    /// Only events with a lower id: the last one of a page leads to the next page
    #[arg(long, value_name = "ID")]
    before_id: Option<i64>,
    /// Only events with a higher id: the same with --oldest-first
    #[arg(long, value_name = "ID")]
    after_id: Option<i64>,
    /// The oldest first
    #[arg(long)]
    oldest_first: bool,
    /// At most so many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

#[derive(Debug, Args)]
#[command(after_help = "\
What an event belongs to are the events with its correlation id, of which the first 200 are drawn.

Example: nexus events show 4711")]
pub(crate) struct Show {
    /// The event's id
    event_id: i64,
    /// Look for what followed within this time, in the whole log if it is 0s
    #[arg(long, default_value = "1d", value_name = "DURATION", value_parser = moments::duration)]
    within: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Each event is shown once its transaction has committed, however long that was open.

Example: nexus events tail --type order.paid --json")]
pub(crate) struct Tail {
    #[command(flatten)]
    which: Which,
    /// Begin with so many that are there already
    #[arg(long, default_value_t = 10, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    last: u32,
}

impl Events {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::List(list) => list.run(session, console).await,
            Self::Show(show) => show.run(session, console).await,
            Self::Tail(tail) => tail.run(session, console).await,
        }
    }
}

impl List {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let mut events = self.which.of(session);
        if let Some(since) = self.since {
            events = events.since(since.before(session.now));
        }
        if let Some(until) = self.until {
            events = events.until(until.before(session.now));
        }
        if let Some(id) = self.before_id {
            events = events.before_id(id);
        }
        if let Some(id) = self.after_id {
            events = events.after_id(id);
        }
        if self.oldest_first {
            events = events.oldest_first();
        }
        let events = events.list(self.limit).await?;
        if console.is_json {
            return console.print_json_list(events.into_iter().map(documents::Event::from));
        }
        let Some(last) = events.last() else {
            return console.print("no such event is in the log\n");
        };
        let mut table = Table::new([">id", "emitted", "", "type", "key", "payload"]);
        for event in &events {
            table.row([
                event.event_id.to_string().into(),
                full(event.emitted_at).into(),
                relative(session.now, event.emitted_at).into(),
                type_and_version(event).into(),
                event.key.as_deref().unwrap_or_default().into(),
                cut(&event.payload.to_string(), 80).into(),
            ]);
        }
        let mut text = table.text("");
        if events.len() == self.limit as usize {
            let next = if self.oldest_first { "after" } else { "before" };
            let _ = writeln!(text, "{DIM}more: --{next}-id {}{DIM:#}", last.event_id);
        }
        console.print(&text)
    }
}

fn type_and_version(event: &LoggedEvent) -> String {
    match event.event_version {
        1 => event.event_type.clone(),
        version => format!("{} v{version}", event.event_type),
    }
}

/// What `show --json` prints.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    event: documents::EventWithDeliveries,
    chain: Vec<documents::EventWithDeliveries>,
}

impl Show {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let client = &session.client;
        let Some(event) = client.event(self.event_id).await? else {
            anyhow::bail!(
                "namespace `{}` has no event {} in its log (one that is delayed is not there yet)",
                client.namespace(),
                self.event_id
            );
        };
        let chain = tree::chain(session, &event, self.within).await?;
        let ids: Vec<i64> = chain.iter().map(|event| event.event_id).collect();
        console.begin("looking through the queues");
        let deliveries = client.deliveries(&ids).await;
        console.clear();
        let deliveries = deliveries?;
        if console.is_json {
            let document = |event: LoggedEvent| {
                let of_event = |delivery: &&Delivery| delivery.event_id == event.event_id;
                let deliveries = deliveries.iter().filter(of_event).cloned().collect();
                documents::EventWithDeliveries::new(event, deliveries)
            };
            return console.print_json(&Shown {
                event: document(event),
                chain: chain.into_iter().map(document).collect(),
            });
        }
        let mut table = Table::new(["", ""]);
        table.row(["event".into(), event.event_id.to_string().into()]);
        table.row([
            "type".into(),
            format!("{} version {}", event.event_type, event.event_version).into(),
        ]);
        let at = format!(
            "{} ({})",
            event.emitted_at,
            relative(session.now, event.emitted_at)
        );
        table.row(["emitted".into(), at.into()]);
        table.row(["by".into(), (&event.producer).into()]);
        for (name, value) in [
            ("key", &event.key),
            ("correlation", &event.correlation_id),
            ("causation", &event.causation_id),
        ] {
            if let Some(value) = value {
                table.row([name.into(), value.into()]);
            }
        }
        if event
            .metadata
            .as_object()
            .is_some_and(|map| !map.is_empty())
        {
            table.row(["metadata".into(), event.metadata.to_string().into()]);
        }
        let payload = serde_json::to_string_pretty(&event.payload)?;
        let payload = indented(&payload);
        let tree = tree::draw(&chain, &deliveries, event.event_id, session.now);
        console.print(&format!("{}\n{payload}\n{tree}", table.text("")))
    }
}

/// How long to wait for more when there is none.
const PAUSE: Duration = Duration::from_millis(500);

/// How many to take at once.
const PAGE: u32 = 500;

impl Tail {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        // Before what is there is listed, so that nothing is left out between.
        let mut tail = self.which.of(session).tail().await?;
        let mut shown_before = Vec::new();
        if self.last > 0 {
            let mut events = self.which.of(session).list(self.last).await?;
            events.reverse();
            for event in &events {
                print_line(event, console)?;
                shown_before.push(event.event_id);
            }
        }
        loop {
            let events = tail.next(PAGE).await?;
            for event in &events {
                if !shown_before.contains(&event.event_id) {
                    print_line(event, console)?;
                }
            }
            if events.len() < PAGE as usize {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn print_line(event: &LoggedEvent, console: &Console) -> anyhow::Result<()> {
    if console.is_json {
        return console.print_json_line(&documents::Event::from(event.clone()));
    }
    let key = event.key.as_deref().unwrap_or("-");
    console.print(&format!(
        "{DIM}{}{DIM:#}  {}  {}  {}  {}\n",
        full(event.emitted_at),
        event.event_id,
        safe(&type_and_version(event)),
        safe(key),
        cut(&safe(&event.payload.to_string()), 100)
    ))
}
