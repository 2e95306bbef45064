//! `nexus replay`

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus::client::{ReplayState, ReplayStatus};
use serde_json::{Value, json};
use uuid::Uuid;

use super::count;
use crate::{
    console::{BAD, Cell, Console, GOOD, Table},
    moments::{Moment, relative},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Replay {
    /// Deliver events of the log once more; nodes of the namespace do it
    Start(Start),
    /// Show how far replays are
    #[command(after_help = "Example: nexus replay status")]
    Status {
        /// The replay; the newest 20 if it is not given
        id: Option<Uuid>,
    },
    /// End a running replay, and take back what nobody handles yet
    #[command(after_help = "Example: nexus replay cancel 0b5c1f2e-1111-4222-8333-444455556666")]
    Cancel {
        /// The replay
        id: Uuid,
    },
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example: nexus replay start billing --handler book_invoice --since 1d --rate 50 --dry-run"
)]
pub(crate) struct Start {
    /// The group that they are delivered to
    group: String,
    /// Only to this handler
    #[arg(long)]
    handler: Option<String>,
    /// Only events of this type; may be repeated
    #[arg(long = "type", value_name = "TYPE")]
    event_types: Vec<String>,
    /// Only events from then on: so long ago, such as 2h, or a time
    #[arg(long, value_name = "WHEN")]
    since: Option<Moment>,
    /// Only events before that
    #[arg(long, value_name = "WHEN")]
    until: Option<Moment>,
    /// Only events with this id or a higher one
    #[arg(long, value_name = "ID")]
    first_id: Option<i64>,
    /// Only events with this id or a lower one
    #[arg(long, value_name = "ID")]
    last_id: Option<i64>,
    /// At most so many messages a second
    #[arg(long)]
    rate: Option<f64>,
    /// Stay until it has ended; Ctrl-C leaves it running
    #[arg(long)]
    wait: bool,
    /// Only tell what would be delivered
    #[arg(long)]
    dry_run: bool,
}

impl Replay {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::Start(start) => start.run(session, console).await,
            Self::Status { id } => status(id, session, console).await,
            Self::Cancel { id } => {
                let found = find(id, session).await?;
                let is_cancelled = session.client.cancel_replay(id).await?;
                anyhow::ensure!(
                    is_cancelled,
                    "replay {id} is not running: it is {}",
                    state(found.state)
                );
                let cancelled = find(id, session).await?;
                if console.is_json {
                    return console.print_json(&document(&cancelled));
                }
                let taken = count(cancelled.taken_back, "message");
                console.print(&format!("replay {id} is cancelled, {taken} taken back\n"))
            }
        }
    }
}

/// How often to look at a replay that is waited for.
const PAUSE: Duration = Duration::from_millis(500);

impl Start {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let mut replay = session.client.replay(&self.group);
        if let Some(handler) = &self.handler {
            replay = replay.handler(handler);
        }
        for event_type in &self.event_types {
            replay = replay.event_type(event_type);
        }
        if let Some(since) = self.since {
            replay = replay.since(since.before(session.now));
        }
        if let Some(until) = self.until {
            replay = replay.until(until.before(session.now));
        }
        if let Some(id) = self.first_id {
            replay = replay.first_id(id);
        }
        if let Some(id) = self.last_id {
            replay = replay.last_id(id);
        }
        if let Some(rate) = self.rate {
            replay = replay.rate(rate);
        }
        let plan = replay.clone().dry_run().await?;
        let about = if plan.is_estimate { "about " } else { "" };
        let messages = format!("{about}{}", count(plan.messages, "message"));
        if self.dry_run {
            if console.is_json {
                return console.print_json(&json!({
                    "events": plan.events,
                    "messages": plan.messages,
                    "leftOut": plan.left_out,
                    "isEstimate": plan.is_estimate,
                    "firstAt": plan.first_at,
                    "lastAt": plan.last_at,
                    "isDryRun": true,
                }));
            }
            return console.print(&format!(
                "{about}{} would be delivered, as {messages}; {} left out, of a version that the handler does not take\n",
                count(plan.events, "event"),
                plan.left_out
            ));
        }
        let group = &self.group;
        let what = format!("{messages} will be delivered to group {group} once more");
        session.ask(console, &what).await?;
        let id = replay.start().await?;
        if !self.wait {
            if console.is_json {
                return console.print_json(&document(&find(id, session).await?));
            }
            return console.print(&format!("{id}\n"));
        }
        console.say(&format!(
            "replay {id} has been started; Ctrl-C leaves it running"
        ));
        console.begin("replaying");
        let ended = loop {
            let now = find(id, session).await?;
            if now.state != ReplayState::Running {
                break now;
            }
            let done = format!("{} of {messages}", now.messages);
            console.progress().set_message(done);
            tokio::time::sleep(PAUSE).await;
        };
        console.clear();
        tell(&[ended], true, session, console)
    }
}

async fn find(id: Uuid, session: &Session) -> anyhow::Result<ReplayStatus> {
    let found = session.client.replay_status(id).await?;
    found.ok_or_else(|| {
        let namespace = session.client.namespace();
        anyhow::anyhow!("namespace `{namespace}` has no replay {id}")
    })
}

async fn status(id: Option<Uuid>, session: &Session, console: &Console) -> anyhow::Result<()> {
    match id {
        Some(id) => tell(&[find(id, session).await?], true, session, console),
        None => tell(&session.client.replays(20).await?, false, session, console),
    }
}

fn state(state: ReplayState) -> &'static str {
    match state {
        ReplayState::Running => "running",
        ReplayState::Finished => "finished",
        ReplayState::Cancelled => "cancelled",
        ReplayState::Failed => "failed",
        _ => "unknown",
    }
}

fn document(replay: &ReplayStatus) -> Value {
    json!({
        "replayId": replay.id,
        "group": replay.group,
        "handler": replay.handler,
        "eventTypes": replay.event_types,
        "rate": replay.rate,
        "state": state(replay.state),
        "error": replay.error,
        "events": replay.events,
        "messages": replay.messages,
        "leftOut": replay.left_out,
        "takenBack": replay.taken_back,
        "waiting": replay.waiting,
        "position": replay.position,
        "lastAt": replay.last_at,
        "createdAt": replay.created_at,
        "finishedAt": replay.finished_at,
    })
}

fn tell(
    replays: &[ReplayStatus],
    is_one: bool,
    session: &Session,
    console: &Console,
) -> anyhow::Result<()> {
    if console.is_json {
        return match replays {
            [replay] if is_one => console.print_json(&document(replay)),
            _ => console.print_json_list(replays.iter().map(document)),
        };
    }
    if replays.is_empty() {
        return console.print("nothing was replayed in the last 30 days\n");
    }
    let mut table = Table::new([
        "replay",
        "to",
        "state",
        "started",
        ">messages",
        ">waiting",
        ">left out",
        "has got to",
        "error",
    ]);
    for replay in replays {
        let to = match &replay.handler {
            Some(handler) => format!("{}/{handler}", replay.group),
            None => replay.group.clone(),
        };
        let style = match replay.state {
            ReplayState::Running => GOOD,
            ReplayState::Failed => BAD,
            _ => anstyle::Style::new(),
        };
        table.row([
            replay.id.to_string().into(),
            to.into(),
            Cell::new(state(replay.state), style),
            relative(session.now, replay.created_at).into(),
            replay.messages.to_string().into(),
            replay.waiting.to_string().into(),
            replay.left_out.to_string().into(),
            replay
                .position
                .map(|at| relative(session.now, at))
                .unwrap_or_default()
                .into(),
            replay.error.as_deref().unwrap_or_default().into(),
        ]);
    }
    console.print(&table.text(""))
}
