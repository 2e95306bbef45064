//! What a run did, for programs and for people.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use nexus::{Handle, prelude::*};

use super::Lines;

/// Repositories in the table for people.
const TOP: i64 = 10;

/// The fields in the order in which they are printed.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    lines: u64,
    emitted: u64,
    rejected: u64,
    handled: u64,
    dead_lettered: u64,
    by_type: BTreeMap<String, u64>,
    #[serde(skip)]
    repositories: Vec<Row>,
}

/// A row of the statistics, over all runs in the namespace.
#[derive(Debug, sqlx::FromRow)]
struct Row {
    repository: Option<String>,
    deliveries: i64,
    issues_opened: i64,
    pull_requests_merged: i64,
    comments: i64,
    commits: i64,
    releases: i64,
    stars: i64,
    forks: i64,
    failures: i64,
}

/// The newest event in the log, where this run begins.
pub(crate) async fn newest_event(handle: &Handle) -> nexus::Result<i64> {
    let newest = sqlx::query_scalar("select coalesce(max(event_id), 0) from core.event_log")
        .fetch_one(handle.client().pool())
        .await?;
    Ok(newest)
}

/// How many messages this node has completed, and given up.
pub(crate) fn finished(handle: &Handle) -> (u64, u64) {
    handle
        .stats()
        .iter()
        .fold((0, 0), |(completed, dead_lettered), handler| {
            (
                completed + handler.completed,
                dead_lettered + handler.dead_lettered,
            )
        })
}

impl Summary {
    pub(crate) async fn of_this_run(
        handle: &Handle,
        newest_before: i64,
        lines: Lines,
    ) -> nexus::Result<Self> {
        let client = handle.client();
        // The log knows what was stored; an emit that repeats an idempotency key looks like any other.
        let by_type: Vec<(String, i64)> = sqlx::query_as(
            "select event_type, count(*) from core.event_log
             where event_id > $1 and namespace = $2 and producer_node_id = $3
             group by 1",
        )
        .bind(newest_before)
        .bind(client.namespace())
        .bind(handle.node_id())
        .fetch_all(client.pool())
        .await?;
        let by_type: BTreeMap<String, u64> = by_type
            .into_iter()
            .map(|(name, count)| (name, count.unsigned_abs()))
            .collect();
        let repositories = sqlx::query_as(
            "select * from webhooks_repositories where namespace = $1
             order by deliveries desc, repository
             limit $2",
        )
        .bind(client.namespace())
        .bind(TOP)
        .fetch_all(client.pool())
        .await?;
        let (handled, dead_lettered) = finished(handle);
        Ok(Self {
            lines: lines.read,
            emitted: by_type.values().sum(),
            rejected: lines.rejected,
            handled,
            dead_lettered,
            by_type,
            repositories,
        })
    }

    pub(crate) fn print_json(&self, output: &mut impl Write) -> io::Result<()> {
        writeln!(output, "{}", serde_json::to_string(self)?)?;
        output.flush()
    }

    pub(crate) fn print_tables(&self, output: &mut impl Write) -> io::Result<()> {
        let Self {
            lines,
            emitted,
            rejected,
            handled,
            dead_lettered,
            by_type,
            repositories,
        } = self;
        write!(
            output,
            "{lines} lines: {emitted} emitted, {rejected} rejected"
        )?;
        match lines - rejected - emitted {
            0 => writeln!(output)?,
            repeated => writeln!(output, ", {repeated} emitted before")?,
        }
        writeln!(
            output,
            "{handled} messages handled, {dead_lettered} dead-lettered"
        )?;
        if !by_type.is_empty() {
            writeln!(output, "\n{:<30} {:>10}", "event type", "emitted")?;
        }
        for (event_type, count) in by_type {
            writeln!(output, "{event_type:<30} {count:>10}")?;
        }
        print_repositories(repositories, output)?;
        output.flush()
    }
}

fn print_repositories(rows: &[Row], output: &mut impl Write) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let heading = "repository, over all runs";
    let names: Vec<String> = rows.iter().map(Row::printable_name).collect();
    let widths = names.iter().map(|name| name.chars().count());
    let width = widths.fold(heading.len(), usize::max);
    writeln!(
        output,
        "\n{heading:<width$} {:>10} {:>7} {:>7} {:>9} {:>8} {:>9} {:>6} {:>6} {:>9}",
        "deliveries",
        "issues",
        "merged",
        "comments",
        "commits",
        "releases",
        "stars",
        "forks",
        "failures"
    )?;
    for (name, row) in names.iter().zip(rows) {
        writeln!(
            output,
            "{name:<width$} {:>10} {:>7} {:>7} {:>9} {:>8} {:>9} {:>6} {:>6} {:>9}",
            row.deliveries,
            row.issues_opened,
            row.pull_requests_merged,
            row.comments,
            row.commits,
            row.releases,
            row.stars,
            row.forks,
            row.failures
        )?;
    }
    Ok(())
}

impl Row {
    /// A name out of a file may be long, and hold what moves a terminal's cursor.
    fn printable_name(&self) -> String {
        let Some(name) = &self.repository else {
            return "(none)".to_owned();
        };
        let mut shown: String = name.chars().take(60).collect();
        if shown.len() < name.len() {
            shown.push('…');
        }
        shown.replace(char::is_control, "\u{fffd}")
    }
}
