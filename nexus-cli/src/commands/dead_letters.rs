//! `nexus dead-letters`

use std::{fmt::Write as _, time::Duration};

use clap::{Args, Subcommand};
use nexus::{
    client::{DeadLetter, DeadLetterCause, DeadLetterCursor, DeadLetterFilter, Group, Redriven},
    jiff::Timestamp,
};
use nexus_http::documents;
use serde_json::Value;

use super::{count, payload};
use crate::{
    console::{BAD, Console, DIM, Table, cut, indented, safe},
    failure::usage,
    moments::{self, relative},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum DeadLetters {
    /// List dead letters, the newest first, or count them by cause
    List(List),
    /// Show a dead letter with its errors and its payload
    #[command(after_help = "Example: nexus dead-letters show billing 17")]
    Show {
        /// The group
        group: String,
        /// The dead letter's id
        id: i64,
    },
    /// Put dead letters back into their queue
    Redrive(Redrive),
    /// Delete dead letters for good; their events stay in the log
    Purge(Purge),
}

/// Which dead letters of a group.
#[derive(Debug, Clone, Args)]
pub(crate) struct Which {
    /// Only those of this handler
    #[arg(long)]
    handler: Option<String>,
    /// Only those of this event type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// Only those of this cause, as `list` shows it
    #[arg(long)]
    fingerprint: Option<String>,
    /// Only those that were given up at least so long ago, such as 30m, 2h or 7d
    #[arg(long, value_name = "DURATION", value_parser = moments::duration)]
    older_than: Option<Duration>,
    /// Only those that were given up less than so long ago
    #[arg(long, value_name = "DURATION", value_parser = moments::duration)]
    newer_than: Option<Duration>,
}

impl Which {
    fn is_all(&self) -> bool {
        self.handler.is_none()
            && self.event_type.is_none()
            && self.fingerprint.is_none()
            && self.older_than.is_none()
            && self.newer_than.is_none()
    }

    fn filter(&self, ids: &[i64]) -> DeadLetterFilter {
        let mut filter = DeadLetterFilter::new();
        if !ids.is_empty() {
            filter = filter.ids(ids.iter().copied());
        }
        if let Some(handler) = &self.handler {
            filter = filter.handler(handler);
        }
        if let Some(event_type) = &self.event_type {
            filter = filter.event_type(event_type);
        }
        if let Some(fingerprint) = &self.fingerprint {
            filter = filter.fingerprint(fingerprint);
        }
        if let Some(age) = self.older_than {
            filter = filter.older_than(age);
        }
        if let Some(age) = self.newer_than {
            filter = filter.newer_than(age);
        }
        filter
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example: nexus dead-letters list billing --handler charge_fee --newer-than 2h"
)]
pub(crate) struct List {
    /// The group; all of them if it is not given
    group: Option<String>,
    #[command(flatten)]
    which: Which,
    /// Count them by handler, event type and cause instead; takes seconds where there are millions
    #[arg(long)]
    by_cause: bool,
    /// Go on after the page that ended there
    #[arg(long, value_name = "CURSOR", requires = "group")]
    after: Option<DeadLetterCursor>,
    /// At most so many, of each group
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Done in batches of 500, each whole or not at all; interrupted, the same command does the rest.

Examples: nexus dead-letters redrive billing 17 18
          nexus dead-letters redrive billing --handler charge_fee --rate 50 --yes
          nexus dead-letters redrive billing 17 --payload '{\"amount\": 12}'")]
pub(crate) struct Redrive {
    /// The group
    group: String,
    /// The dead letters' ids
    ids: Vec<i64>,
    #[command(flatten)]
    which: Which,
    /// All of the group
    #[arg(long)]
    all: bool,
    /// At most so many, the oldest first
    #[arg(long)]
    limit: Option<u64>,
    /// Let at most so many become due in a second
    #[arg(long, value_name = "MESSAGES", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Put one dead letter back with this payload, which has to fit the registered schema; - reads it
    #[arg(long, value_name = "JSON", conflicts_with_all = ["all", "limit", "rate"])]
    payload: Option<String>,
    /// Who does it, for the history of the messages
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Done in batches of 500; interrupted, the same command does the rest.

Example: nexus dead-letters purge billing --type coupon.offered --older-than 30d --dry-run")]
pub(crate) struct Purge {
    /// The group
    group: String,
    /// The dead letters' ids
    ids: Vec<i64>,
    #[command(flatten)]
    which: Which,
    /// All of the group
    #[arg(long)]
    all: bool,
    /// Only tell how many they are
    #[arg(long)]
    dry_run: bool,
}

impl DeadLetters {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::List(list) if list.by_cause => list.count_by_cause(session, console).await,
            Self::List(list) => list.run(session, console).await,
            Self::Show { group, id } => show(&group, id, session, console).await,
            Self::Redrive(redrive) => redrive.run(session, console).await,
            Self::Purge(purge) => purge.run(session, console).await,
        }
    }
}

pub(super) fn table(letters: &[DeadLetter], now: Timestamp) -> Table {
    let mut table = Table::new([
        ">id", "group", "handler", "given up", "event", "reason", "cause", "error",
    ]);
    for letter in letters {
        let event = format!(
            "{} {}",
            letter.event_id.map(|id| id.to_string()).unwrap_or_default(),
            letter.event_type.as_deref().unwrap_or_default()
        );
        table.row([
            letter.id.to_string().into(),
            (&letter.group).into(),
            letter.handler.as_deref().unwrap_or("-").into(),
            relative(now, letter.failed_at).into(),
            event.trim().into(),
            (&letter.reason).into(),
            letter.fingerprint.as_deref().unwrap_or_default().into(),
            cut(letter.error.as_deref().unwrap_or_default(), 60).into(),
        ]);
    }
    table
}

/// The newest dead letters of these groups, newest first.
pub(super) async fn newest(
    groups: &[Group],
    limit: u32,
    session: &Session,
) -> anyhow::Result<Vec<DeadLetter>> {
    let mut letters = Vec::new();
    for group in groups {
        letters.extend(session.client.dead_letters(&group.name, limit).await?);
    }
    letters.sort_by_key(|letter| std::cmp::Reverse(letter.failed_at));
    letters.truncate(limit as usize);
    Ok(letters)
}

impl List {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let client = &session.client;
        let groups = if let Some(group) = &self.group {
            vec![group.clone()]
        } else {
            let groups = client.groups().await?;
            groups.into_iter().map(|group| group.name).collect()
        };
        let mut letters = Vec::new();
        for group in &groups {
            let mut page = client
                .dead_letters(group, self.limit)
                .filter(self.which.filter(&[]));
            if let Some(cursor) = self.after {
                page = page.after(cursor);
            }
            letters.extend(page.await?);
        }
        if console.is_json {
            return console.print_json_list(letters.into_iter().map(documents::DeadLetter::from));
        }
        if letters.is_empty() {
            return console.print("there is no such dead letter\n");
        }
        let mut text = table(&letters, session.now).text("");
        if let (Some(_), Some(last)) = (&self.group, letters.last())
            && letters.len() == self.limit as usize
        {
            let _ = writeln!(text, "{DIM}more: --after {}{DIM:#}", last.cursor());
        }
        console.print(&text)
    }

    async fn count_by_cause(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        console.begin("counting");
        let causes = session
            .client
            .dead_letter_summary(self.which.filter(&[]))
            .await;
        console.clear();
        let of_group = |cause: &DeadLetterCause| {
            let group = self.group.as_ref();
            group.is_none_or(|group| *group == cause.group)
        };
        let causes: Vec<_> = causes?.into_iter().filter(of_group).collect();
        if console.is_json {
            let documents = causes.into_iter().map(documents::DeadLetterCause::from);
            return console.print_json_list(documents);
        }
        if causes.is_empty() {
            return console.print("there is no such dead letter\n");
        }
        let mut table = Table::new([
            ">number",
            "group",
            "handler",
            "event type",
            "cause",
            "first",
            "last",
            ">newest",
            "error",
        ]);
        for cause in &causes {
            table.row([
                cause.letters.to_string().into(),
                (&cause.group).into(),
                cause.handler.as_deref().unwrap_or("-").into(),
                cause.event_type.as_deref().unwrap_or_default().into(),
                cause.fingerprint.as_deref().unwrap_or_default().into(),
                relative(session.now, cause.first_failed_at).into(),
                relative(session.now, cause.last_failed_at).into(),
                cause.sample_id.to_string().into(),
                cut(cause.sample_error.as_deref().unwrap_or_default(), 60).into(),
            ]);
        }
        console.print(&table.text(""))
    }
}

async fn show(group: &str, id: i64, session: &Session, console: &Console) -> anyhow::Result<()> {
    let found = session.client.dead_letters(group, 1).filter(&[id]).await?;
    let Some(letter) = found.into_iter().next() else {
        anyhow::bail!(
            "group `{group}` has no dead letter {id}: it was redriven or purged, or never was"
        );
    };
    if console.is_json {
        return console.print_json(&documents::DeadLetter::from(letter));
    }
    let mut table = Table::new(["", ""]);
    table.row([
        "dead letter".into(),
        format!("{id} of group {group}").into(),
    ]);
    table.row([
        "handler".into(),
        letter.handler.as_deref().unwrap_or("-").into(),
    ]);
    let event = letter.event_id.map(|id| id.to_string()).unwrap_or_default();
    let event_type = letter.event_type.as_deref().unwrap_or_default();
    table.row(["event".into(), format!("{event} {event_type}").into()]);
    let failed = format!(
        "{} ({})",
        letter.failed_at,
        relative(session.now, letter.failed_at)
    );
    table.row(["given up".into(), failed.into()]);
    table.row(["reason".into(), (&letter.reason).into()]);
    table.row([
        "cause".into(),
        letter.fingerprint.as_deref().unwrap_or_default().into(),
    ]);
    let edited = if letter.is_edited {
        ", with an edited payload"
    } else {
        ""
    };
    table.row([
        "attempts".into(),
        format!(
            "{}; redriven {}{edited}",
            letter.attempts,
            count(letter.redrive_count.into(), "time")
        )
        .into(),
    ]);
    let mut text = table.text("");
    if let Some(error) = &letter.error {
        let _ = writeln!(text, "\n{BAD}{}{BAD:#}", safe(error));
    }
    for past in &letter.redrives {
        text += &safe(&format!(
            "redriven at {} by {}, {} before: {}",
            past.at,
            past.by,
            count(past.attempts.into(), "attempt"),
            past.error.as_deref().unwrap_or(&past.reason)
        ));
        text.push('\n');
    }
    for past in &letter.errors {
        text += &safe(&format!(
            "attempt {} at {}: {}",
            past.attempt, past.at, past.error
        ));
        text.push('\n');
    }
    text.push('\n');
    text += &indented(&serde_json::to_string_pretty(&letter.original)?);
    console.print(&text)
}

/// Nothing was said of which: then it has to be said that all are meant.
fn check_meant(ids: &[i64], which: &Which, all: bool) -> anyhow::Result<()> {
    let is_filtered = !ids.is_empty() || !which.is_all();
    match (is_filtered, all) {
        (false, false) => Err(usage(
            "say which dead letters: by id, by a condition, or --all",
        )),
        (true, true) => Err(usage(
            "--all is every dead letter of the group: leave the ids and conditions out",
        )),
        _ => Ok(()),
    }
}

impl Redrive {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        if let Some(given) = &self.payload {
            return self.run_edited(&payload(given)?, session, console).await;
        }
        check_meant(&self.ids, &self.which, self.all)?;
        let redrive = || {
            let filter = self.which.filter(&self.ids);
            let mut redrive = session.client.redrive(&self.group, filter);
            if let Some(limit) = self.limit {
                redrive = redrive.limit(limit);
            }
            if let Some(rate) = self.rate {
                redrive = redrive.rate(rate, Duration::from_secs(1));
            }
            if let Some(by) = &self.by {
                redrive = redrive.by(by);
            }
            redrive
        };
        if self.dry_run {
            let plan = redrive().dry_run().await?;
            return self.tell(plan, session, console);
        }
        // By id it is known what is meant.
        if self.ids.is_empty() {
            let plan = redrive().dry_run().await?;
            let messages = count(plan.messages, "dead letter");
            let what = format!("{messages} of group {} will be handled again", self.group);
            session.ask(console, &what).await?;
        }
        console.begin("redriving");
        let bar = console.progress();
        let done = redrive()
            .on_progress(|done| bar.set_message(done.messages.to_string()))
            .await;
        console.clear();
        self.tell(done?, session, console)
    }

    async fn run_edited(
        &self,
        payload: &Value,
        session: &Session,
        console: &Console,
    ) -> anyhow::Result<()> {
        let [id] = self.ids[..] else {
            return Err(usage("--payload is for one dead letter, given by its id"));
        };
        let mut redrive = session.client.redrive_edited(&self.group, id, payload);
        if let Some(by) = &self.by {
            redrive = redrive.by(by);
        }
        if self.dry_run {
            redrive = redrive.dry_run();
        }
        self.tell(redrive.await?, session, console)
    }

    fn tell(&self, done: Redriven, session: &Session, console: &Console) -> anyhow::Result<()> {
        if console.is_json {
            return console.print_json(&documents::Redriven::new(done, self.dry_run));
        }
        let would = if self.dry_run { " would be" } else { "" };
        let mut text = format!("{}{would} put back", count(done.messages, "dead letter"));
        if let (Some(_), Some(last)) = (self.rate, done.last_due_at) {
            let _ = write!(text, ", the last is due {}", relative(session.now, last));
        }
        text.push('\n');
        for handler in done.handlers.iter().filter(|handler| !handler.is_live) {
            let _ = writeln!(
                text,
                "{} of them wait for {}, which no live node runs",
                handler.messages,
                safe(handler.handler.as_deref().unwrap_or("-"))
            );
        }
        for left in &done.left {
            let _ = writeln!(
                text,
                "{} of {} stay: {}",
                left.letters,
                safe(left.handler.as_deref().unwrap_or("-")),
                left.why
            );
        }
        if done.missing > 0 {
            let _ = writeln!(text, "{} of the ids are not there", done.missing);
        }
        console.print(&text)?;
        anyhow::ensure!(
            done.missing == 0 || done.messages > 0,
            "none of these dead letters is in group `{}`",
            self.group
        );
        Ok(())
    }
}

impl Purge {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        check_meant(&self.ids, &self.which, self.all)?;
        let purge = || {
            let filter = self.which.filter(&self.ids);
            session.client.purge_dead_letters(&self.group, filter)
        };
        let plan = purge().dry_run().await?;
        let done = if self.dry_run {
            plan
        } else {
            let letters = count(plan.letters, "dead letter");
            let what = format!("{letters} of group {} will be deleted", self.group);
            session.ask(console, &what).await?;
            console.begin("purging");
            let bar = console.progress();
            let done = purge()
                .on_progress(|done| bar.set_message(done.letters.to_string()))
                .await;
            console.clear();
            done?
        };
        if console.is_json {
            return console.print_json(&documents::Purged {
                dead_letters: done.letters,
                is_dry_run: self.dry_run,
            });
        }
        let would = if self.dry_run { " would be" } else { "" };
        console.print(&format!(
            "{}{would} deleted\n",
            count(done.letters, "dead letter")
        ))
    }
}
