//! `nexus status`

use std::fmt::Write as _;

use nexus::client::{Group, Node, ReplayState, ReplayStatus, ScheduledTask, XminHolder};
use nexus_http::documents;
use serde::Serialize;
use serde_json::{Value, json};

use super::{count, dead_letters, groups};
use crate::{
    console::{BAD, BOLD, Console, DIM, WARN, safe},
    moments::{full, relative, short},
    session::Session,
};

/// Dead letters that are shown.
const LETTERS: u32 = 3;

pub(crate) async fn run(session: &Session, console: &Console) -> anyhow::Result<()> {
    let client = &session.client;
    let nodes = client.nodes().await?;
    let groups = client.groups().await?;
    let tasks = client.schedules().await?;
    let letters = dead_letters::newest(&groups, LETTERS, session).await?;
    let holder = client.xmin_holder().await?;
    let mut replays = client.replays(20).await?;
    replays.retain(|replay| replay.state == ReplayState::Running);
    if console.is_json {
        return console.print_json(&json!({
            "namespace": client.namespace(),
            "database": session.target,
            "time": session.now,
            "nodes": list(nodes, documents::Node::from),
            "groups": list(groups, documents::Group::from),
            "schedules": list(tasks, documents::ScheduledTask::from),
            "newestDeadLetters": list(letters, documents::DeadLetter::from),
            "runningReplays": replays.len(),
            "xminHolder": holder.as_ref().map(holder_document),
        }));
    }
    let mut text = format!(
        "{BOLD}{}{BOLD:#} at {}, {} UTC\n\n",
        safe(client.namespace()),
        safe(&session.target),
        full(session.now)
    );
    text += &line("nodes", &tell_nodes(&nodes, session));
    text += &line("schedules", &tell_tasks(&tasks, session));
    text += &line("replays", &tell_replays(&replays));
    text += &line("xmin", &tell_holder(holder.as_ref()));
    if groups.is_empty() {
        text += &line("groups", "none");
    } else {
        let _ = write!(text, "\n{}", groups::table(&groups).text(""));
    }
    for (group, handler) in groups
        .iter()
        .flat_map(|group: &Group| group.handlers.iter().map(move |handler| (group, handler)))
        .filter(|(_, handler)| !handler.is_live && handler.depth.counted > 0)
    {
        let _ = writeln!(
            text,
            "{WARN}{} wait for {}/{}, which no live node runs{WARN:#}",
            handler.depth,
            safe(&group.name),
            safe(&handler.name)
        );
    }
    if !letters.is_empty() {
        let table = dead_letters::table(&letters, session.now);
        let _ = write!(text, "\nnewest dead letters\n{}", table.text(""));
    }
    console.print(&text)
}

fn line(name: &str, text: &str) -> String {
    format!("{DIM}{name:<10}{DIM:#} {text}\n")
}

fn tell_nodes(nodes: &[Node], session: &Session) -> String {
    if nodes.is_empty() {
        return format!("{WARN}none: nothing is handled{WARN:#}");
    }
    let (live, silent): (Vec<&Node>, Vec<&Node>) = nodes.iter().partition(|node| node.is_live);
    let mut apps: Vec<&str> = live.iter().map(|node| node.app.as_str()).collect();
    apps.sort_unstable();
    let apps: Vec<String> = apps
        .chunk_by(|one, other| one == other)
        .map(|nodes| safe(&format!("{} of {}", nodes.len(), nodes[0])))
        .collect();
    let mut text = format!("{} live", live.len());
    if live.is_empty() {
        text = format!("{BAD}none is live: nothing is handled{BAD:#}");
    } else {
        let _ = write!(text, " ({})", apps.join(", "));
    }
    for node in silent {
        let _ = write!(
            text,
            "; {BAD}{} silent since {}{BAD:#}",
            safe(&node.id),
            relative(session.now, node.last_heartbeat)
        );
    }
    text
}

fn tell_tasks(tasks: &[ScheduledTask], session: &Session) -> String {
    let is_paused = |task: &&ScheduledTask| task.is_active && task.paused_at.is_some();
    let paused = tasks.iter().filter(is_paused).count();
    let inactive: Vec<&ScheduledTask> = tasks.iter().filter(|task| !task.is_active).collect();
    let mut text = format!("{} active", tasks.len() - paused - inactive.len());
    let next = tasks
        .iter()
        .filter_map(|task| Some((task.next_run_at?, task)))
        .min_by_key(|(at, _)| *at);
    if let Some((at, task)) = next {
        let _ = write!(
            text,
            ", next {} {}",
            safe(&task.name),
            relative(session.now, at)
        );
    }
    if paused > 0 {
        let _ = write!(text, "; {WARN}{paused} paused{WARN:#}");
    }
    for task in inactive {
        let why = task.last_error.as_deref();
        let why = why
            .map(|why| format!(": {}", safe(why)))
            .unwrap_or_default();
        let _ = write!(text, "; {WARN}{} inactive{why}{WARN:#}", safe(&task.name));
    }
    text
}

fn tell_replays(replays: &[ReplayStatus]) -> String {
    match replays.len() {
        0 => "none runs".to_owned(),
        running => format!("{} running", count(running as u64, "replay")),
    }
}

fn tell_holder(holder: Option<&XminHolder>) -> String {
    let Some(holder) = holder else {
        return "nobody keeps the server from cleaning up".to_owned();
    };
    let pid = holder.pid.map(|pid| format!(" {pid}")).unwrap_or_default();
    let user = holder
        .user
        .as_deref()
        .map(|user| format!(" of {user}"))
        .unwrap_or_default();
    let state = holder
        .state
        .as_deref()
        .map(|state| format!(", {state}"))
        .unwrap_or_default();
    let age = holder
        .age
        .map(|age| format!(" for {}", short(age)))
        .unwrap_or_default();
    let what = safe(&format!(
        "{}{pid} `{}`{user}{state}{age}, {} since",
        holder.kind,
        holder.name,
        count(holder.transactions.unsigned_abs(), "transaction")
    ));
    let is_long = holder.age.is_some_and(|age| age.as_secs() > 30);
    if is_long {
        format!("{BAD}{what}{BAD:#}")
    } else {
        what
    }
}

fn list<T, D: Serialize>(all: Vec<T>, document: impl Fn(T) -> D) -> Vec<D> {
    all.into_iter().map(document).collect()
}

fn holder_document(holder: &XminHolder) -> Value {
    json!({
        "kind": holder.kind,
        "pid": holder.pid,
        "name": holder.name,
        "user": holder.user,
        "state": holder.state,
        "transactions": holder.transactions,
        "ageSeconds": holder.age.map(|age| age.as_secs_f64()),
    })
}
