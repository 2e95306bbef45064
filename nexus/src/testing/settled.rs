//! Whether anything is left to do, and what.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    panic::Location,
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::Row;

use super::{TestDatabase, database::Member};
use crate::client::DeadLetter;

/// How long a test waits before it gives up: generous, because machines are shared.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);

/// How long it waits while attempts begin: on a machine that runs many tests at once each takes its time.
pub(super) const MOST_PATIENCE: Duration = Duration::from_mins(5);

/// When all that is open waits for nodes that are not there, one may still be about to start.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Most dead letters that are read of a group.
const MOST_LETTERS: u32 = 10_000;

/// Most lines of a kind in a report.
const MOST_LINES: usize = 20;

/// Something is still to be done, or waits for what will not come. Its text says what, and why.
///
/// ```text
/// not settled within 60s; still open:
/// - handler `charge` has been running for 59.8s on node `test-4711-1`: event 7 (`order.placed`),
///   attempt 2 (attempt 1 failed: the card was refused)
/// - handler `ship` has not taken yet: 3 messages, the first is event 8 (`order.placed`), attempt 1
/// waiting for a later time, which is not waited for (move the clock):
/// - handler `notify` in 19m 40s: event 7 (`order.placed`), attempt 3 (attempt 2 failed: no route to host)
/// dead letters:
/// - handler `audit`: event 7, `order.placed`, Attempts exhausted after attempt 10: disk full
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotSettled {
    limit: Duration,
    open: Vec<String>,
    waiting: Vec<String>,
    dead_letters: Vec<String>,
}

impl NotSettled {
    /// What is open, what waits, and how a test goes on to it; and what was given up.
    pub(super) fn outlook(&self) -> String {
        let mut text = String::new();
        if !self.waiting.is_empty() {
            let _ = write!(
                text,
                "\nwaiting for a later time (`drained()` lives through it, `advance(duration)` moves the clock to it):{}",
                lines(&self.waiting)
            );
        }
        if !self.open.is_empty() {
            let _ = write!(
                text,
                "\nstill open (`settled()` waits for it):{}",
                lines(&self.open)
            );
        }
        if !self.dead_letters.is_empty() {
            let _ = write!(text, "\ndead letters:{}", lines(&self.dead_letters));
        }
        text
    }

    /// What is still open, a line each.
    #[must_use]
    pub fn open(&self) -> &[String] {
        &self.open
    }

    /// What waits for a later time, a line each.
    #[must_use]
    pub fn waiting(&self) -> &[String] {
        &self.waiting
    }

    /// What was given up, a line each.
    #[must_use]
    pub fn dead_letters(&self) -> &[String] {
        &self.dead_letters
    }
}

impl fmt::Display for NotSettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "not settled within {:?}; still open:{}",
            self.limit,
            lines(&self.open)
        )?;
        if !self.waiting.is_empty() {
            write!(
                f,
                "\nwaiting for a later time, which is not waited for (move the clock):{}",
                lines(&self.waiting)
            )?;
        }
        if !self.dead_letters.is_empty() {
            write!(f, "\ndead letters:{}", lines(&self.dead_letters))?;
        }
        Ok(())
    }
}

impl std::error::Error for NotSettled {}

/// Waits until nothing is open: for `limit`, and up to `most` as long as attempts begin.
pub(super) async fn settled(
    database: &TestDatabase,
    limit: Duration,
    most: Duration,
    at: &Location<'_>,
) -> Result<(), NotSettled> {
    {
        let began = Instant::now();
        let (mut limit, patience) = (limit, limit);
        let mut seen = None;
        // What was emitted past the client, or came due by itself, need not wait for the next poll.
        database.alarm();
        loop {
            let looked = Instant::now();
            if !is_open(database, at).await && is_counted(database) {
                return Ok(());
            }
            let waited = began.elapsed();
            // Looked at twice, half of the patience apart.
            if limit < most && seen.is_none() && waited + patience / 2 >= limit {
                seen = Some(claims(database, at).await);
            }
            if limit < most && waited >= limit {
                let now = Some(claims(database, at).await);
                if seen != now {
                    seen = now;
                    limit = (limit + patience / 2).min(most);
                }
            }
            if waited >= limit || (waited >= STUCK_AFTER && is_stuck(database, at).await) {
                let mut report = report(database, limit, at).await;
                if !report.open.is_empty() {
                    return Err(report);
                }
                if waited >= limit {
                    // It has settled at the last moment, but for the books.
                    report
                        .open
                        .push("a node has not noted yet that it is done".to_owned());
                    return if is_counted(database) {
                        Ok(())
                    } else {
                        Err(report)
                    };
                }
            }
            // A look at a long queue takes its time; the nodes need theirs, too.
            let pause =
                (looked.elapsed() * 2).clamp(Duration::from_millis(2), Duration::from_millis(50));
            tokio::time::sleep(pause).await;
        }
    }
}

/// The messages that are there, and how often each has been claimed.
async fn claims(database: &TestDatabase, at: &Location<'_>) -> Vec<(String, i64, i32)> {
    sqlx::query_as("select queue, msg_id, read_ct from core.test_messages($1, $2) order by 1, 2")
        .bind(database.dead_nodes())
        .bind(database.live_nodes())
        .fetch_all(database.shared_pool())
        .await
        .unwrap_or_else(|error| panic!("{at}: the database cannot be asked: {error}"))
}

/// A message that is completed is gone from its queue a moment before it is counted.
fn is_counted(database: &TestDatabase) -> bool {
    let members = database.members();
    let mut alive = members.iter().filter(|member| !member.is_gone());
    alive.all(|member| member.leases.is_empty())
}

async fn is_open(database: &TestDatabase, at: &Location<'_>) -> bool {
    let asked = async {
        // What new subscriptions are owed is looked for by their nodes every two seconds.
        let sent: Option<i64> = sqlx::query_scalar(
            "select sum(core.settle_subscriptions(namespace))::bigint
             from (select distinct namespace from core.subscriptions where since_snapshot is not null) n",
        )
        .fetch_one(database.shared_pool())
        .await?;
        if sent.unwrap_or_default() > 0 {
            database.alarm();
        }
        sqlx::query_scalar("select core.test_is_open($1, $2)")
            .bind(database.dead_nodes())
            .bind(database.live_nodes())
            .fetch_one(database.shared_pool())
            .await
    };
    asked
        .await
        .unwrap_or_else(|error| panic!("{at}: the database cannot be asked: {error}"))
}

/// Whether all that is open waits for a node that is not there.
async fn is_stuck(database: &TestDatabase, at: &Location<'_>) -> bool {
    sqlx::query_scalar(
        "select not exists (select from core.test_messages($1, $2) where state in ('due', 'held', 'foreign'))
            and not exists (select from core.test_timed($1, $2) where due_in_micros <= 0)
            and not exists (select from core.test_open_cuts())",
    )
    .bind(database.dead_nodes())
    .bind(database.live_nodes())
    .fetch_one(database.shared_pool())
    .await
    .unwrap_or_else(|error| panic!("{at}: the database cannot be asked: {error}"))
}

/// What waits for a later time.
pub(super) struct Left {
    /// No message and no delayed emit is left, neither open nor waiting.
    pub(super) is_drained: bool,
    /// How long it is until the next thing is due, a tick included.
    pub(super) next: Option<Duration>,
}

/// By one statement: what comes due while it is asked for is seen once.
pub(super) async fn left(database: &TestDatabase, at: &Location<'_>) -> Left {
    let (is_drained, next): (bool, Option<i64>) = sqlx::query_as(
        "select not core.test_is_open($1, $2) and core.test_next(false, $1, $2) is null, core.test_next(true, $1, $2)",
    )
    .bind(database.dead_nodes())
    .bind(database.live_nodes())
    .fetch_one(database.shared_pool())
    .await
    .unwrap_or_else(|error| panic!("{at}: the database cannot be asked: {error}"));
    Left {
        is_drained,
        next: next.map(|micros| Duration::from_micros(micros.unsigned_abs())),
    }
}

/// A row of `core.test_messages`.
struct Waiting {
    queue: String,
    msg_id: i64,
    read_ct: i32,
    state: String,
    due_in: i64,
    handler: Option<String>,
    version: Option<String>,
    event_type: Option<String>,
    event_id: Option<i64>,
    attempts: i32,
    error: Option<String>,
}

/// Everything that is open, waits, or was given up.
pub(super) async fn report(
    database: &TestDatabase,
    limit: Duration,
    at: &Location<'_>,
) -> NotSettled {
    let asked = async {
        let rows = sqlx::query(
            "select queue, msg_id, read_ct, state, due_in_micros, handler, event_version, event_type,
                    event_id, attempts, error
             from core.test_messages($1, $2)",
        )
        .bind(database.dead_nodes())
        .bind(database.live_nodes())
        .fetch_all(database.shared_pool())
        .await?;
        let messages: Vec<Waiting> = rows
            .into_iter()
            .map(|row| Waiting {
                queue: row.get(0),
                msg_id: row.get(1),
                read_ct: row.get(2),
                state: row.get(3),
                due_in: row.get(4),
                handler: row.get(5),
                version: row.get(6),
                event_type: row.get(7),
                event_id: row.get(8),
                attempts: row.get(9),
                error: row.get(10),
            })
            .collect();
        let timed: Vec<(String, String, i64)> =
            sqlx::query_as("select kind, what, due_in_micros from core.test_timed($1, $2)")
                .bind(database.dead_nodes())
                .bind(database.live_nodes())
                .fetch_all(database.shared_pool())
                .await?;
        let cuts: Vec<(String, String, i32, String)> =
            sqlx::query_as("select handler, event_type, pid, query from core.test_open_cuts()")
                .fetch_all(database.shared_pool())
                .await?;
        let namespaces: Vec<String> = sqlx::query_scalar("select namespace from core.namespaces")
            .fetch_all(database.shared_pool())
            .await?;
        Ok::<_, sqlx::Error>((messages, timed, cuts, namespaces))
    };
    let (messages, timed, cuts, namespaces) = asked
        .await
        .unwrap_or_else(|error| panic!("{at}: the database cannot be asked: {error}"));
    let members = database.members();
    let (mut open, mut waiting) = (Vec::new(), Vec::new());
    let mut buffered: BTreeMap<String, Vec<&Waiting>> = BTreeMap::new();
    let mut queued: BTreeMap<(&str, String), Vec<&Waiting>> = BTreeMap::new();
    for message in &messages {
        match message.state.as_str() {
            "held" => match held(message, &members) {
                Held::Line(line) => open.push(line),
                Held::Buffered(node) => buffered.entry(node).or_default().push(message),
            },
            "later" => waiting.push(later(message)),
            state => {
                let handler = message.handler.clone().unwrap_or_default();
                queued.entry((state, handler)).or_default().push(message);
            }
        }
    }
    open.extend(
        buffered
            .iter()
            .map(|(place, messages)| format!("{place}: {}", some(messages))),
    );
    open.extend(
        queued
            .iter()
            .map(|((state, _), messages)| due(state, messages)),
    );
    for (kind, what, due_in) in timed {
        if due_in <= 0 {
            open.push(format!("{kind} `{what}` has been due for {}", span(due_in)));
        } else if kind != "tick" {
            waiting.push(format!("{kind} `{what}` in {}", span(due_in)));
        }
    }
    open.extend(cuts.iter().map(|(handler, event_type, pid, query)| {
        format!(
            "handler `{handler}` may be owed a `{event_type}` by a transaction that began before it was registered and is still open: backend {pid}, `{}`",
            query.split_whitespace().collect::<Vec<_>>().join(" ")
        )
    }));
    let mut letters = Vec::new();
    for namespace in namespaces {
        let given_up = dead_letters(database, &namespace, at).await;
        letters.extend(given_up.iter().map(letter));
    }
    NotSettled {
        limit,
        open,
        waiting,
        dead_letters: letters,
    }
}

fn event(message: &Waiting) -> String {
    let event_type = message.event_type.as_deref().unwrap_or("?");
    match message.event_id {
        Some(id) => format!("event {id} (`{event_type}`)"),
        None => format!("message {} (`{event_type}`)", message.msg_id),
    }
}

fn attempt(message: &Waiting) -> String {
    let history = match &message.error {
        Some(error) => format!(" (attempt {} failed: {error})", message.attempts),
        None => String::new(),
    };
    format!(
        "{}, attempt {}{history}",
        event(message),
        message.attempts + 1
    )
}

/// Several messages, by the first of them.
fn some(messages: &[&Waiting]) -> String {
    let first = attempt(messages[0]);
    match messages.len() {
        1 => first,
        count => format!("{count} messages, the first is {first}"),
    }
}

/// Where a claimed message is.
enum Held {
    /// In a place of its own.
    Line(String),
    /// In the buffer of a node, with others.
    Buffered(String),
}

fn held(message: &Waiting, members: &[Member]) -> Held {
    let handler = message.handler.as_deref().unwrap_or("?");
    let attempt = attempt(message);
    let lease = span(message.due_in);
    let holder = members.iter().find(|member| {
        let leases = member.leases.of_queues();
        let mut of_queue = leases.iter().filter(|(queue, _)| *queue == message.queue);
        of_queue.any(|(_, leases)| {
            let mut leases = leases.iter();
            leases.any(|lease| (lease.msg_id, lease.read_ct) == (message.msg_id, message.read_ct))
        })
    });
    // A node that has crashed holds no lease any more.
    let holder = holder.or_else(|| {
        members.iter().find(|member| {
            let mut left_behind = member.points.left_behind().into_iter();
            left_behind.any(|(queue, msg_id, read_ct)| {
                queue == message.queue && (msg_id, read_ct) == (message.msg_id, message.read_ct)
            })
        })
    });
    let Some(member) = holder else {
        return Held::Line(format!(
            "handler `{handler}`: {attempt}, is held by a node that this test has not started, or by nobody any more; its lease ends in {lease}"
        ));
    };
    let Member {
        node_id, points, ..
    } = member;
    if member.is_gone() {
        let end = if points.has_crashed() {
            "crashed"
        } else {
            "is gone"
        };
        return Held::Line(format!(
            "handler `{handler}`: {attempt}, was taken by node `{node_id}`, which {end}; another node may take it in {lease} (or move the clock by that)"
        ));
    }
    match points.running(&message.queue, message.msg_id, message.read_ct) {
        Some(running) => Held::Line(format!(
            "handler `{handler}` has been running for {:.1?} on node `{node_id}`: {attempt}",
            running.took
        )),
        None => Held::Buffered(format!(
            "handler `{handler}` on node `{node_id}` has no free slot yet, or its verdict is being stored"
        )),
    }
}

fn later(message: &Waiting) -> String {
    let due_in = span(message.due_in);
    match &message.handler {
        Some(handler) => format!("handler `{handler}` in {due_in}: {}", attempt(message)),
        None => format!("{} in {due_in}", event(message)),
    }
}

fn due(state: &str, messages: &[&Waiting]) -> String {
    let first = messages[0];
    let handler = first.handler.as_deref().unwrap_or("?");
    let some = some(messages);
    match state {
        "foreign" => format!("to be adopted from queue `{}`: {some}", first.queue),
        "nobody" => format!(
            "handler `{handler}` for version {} is run by no live node: {some}",
            first.version.as_deref().unwrap_or("?")
        ),
        _ => format!("handler `{handler}` has not taken yet: {some}"),
    }
}

/// All dead letters of a namespace, oldest first.
pub(super) async fn dead_letters(
    database: &TestDatabase,
    namespace: &str,
    at: &Location<'_>,
) -> Vec<DeadLetter> {
    let asked = async {
        let groups: Vec<String> =
            sqlx::query_scalar("select group_name from core.groups where namespace = $1")
                .bind(namespace)
                .fetch_all(database.shared_pool())
                .await?;
        // Not an app's own client: the app may be gone.
        let client = database.client(namespace);
        let mut letters = Vec::new();
        for group in groups {
            letters.extend(client.dead_letters(&group, MOST_LETTERS).await?);
        }
        Ok::<_, crate::Error>(letters)
    };
    let mut letters = asked
        .await
        .unwrap_or_else(|error| panic!("{at}: dead letters cannot be read: {error}"));
    letters.sort_by_key(|letter| (letter.failed_at, letter.id));
    letters
}

/// A dead letter in a line.
pub(super) fn letter(letter: &DeadLetter) -> String {
    let handler = match &letter.handler {
        Some(handler) => format!("handler `{handler}`"),
        None => format!("group `{}`", letter.group),
    };
    let event = letter
        .event_id
        .map_or_else(String::new, |id| format!(" event {id},"));
    let event_type = match letter.original.get("eventType") {
        Some(Value::String(event_type)) => format!(" `{event_type}`,"),
        _ => String::new(),
    };
    let error = letter.error.as_deref().unwrap_or("no error");
    format!(
        "{handler}:{event}{event_type} {} after attempt {}: {error}",
        letter.reason, letter.attempts
    )
}

/// As a list below what stands before it.
pub(super) fn lines(lines: &[String]) -> String {
    let mut text = String::new();
    for line in lines.iter().take(MOST_LINES) {
        let _ = write!(text, "\n- {line}");
    }
    if lines.len() > MOST_LINES {
        let _ = write!(text, "\n- and {} more", lines.len() - MOST_LINES);
    }
    text
}

/// Names in backticks.
pub(super) fn list(names: &[&str]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names
        .iter()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// A time that is `micros` away, as people say it.
fn span(micros: i64) -> String {
    let span = Duration::from_micros(micros.unsigned_abs());
    match span.as_secs() {
        0..60 => format!("{span:.1?}"),
        60..3600 => format!("{}m {}s", span.as_secs() / 60, span.as_secs() % 60),
        seconds => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
    }
}
