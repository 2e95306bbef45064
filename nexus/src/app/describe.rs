//! What an app is made of, for people and for programs.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use super::{App, register::fingerprint};
use crate::{
    event::Origin,
    registry::{CronDescriptor, Trigger},
    schedule::{DEFAULT_GRACE, Misfire},
};

/// What an app is made of, from [`App::describe`].
///
/// Displayed, it is a table for people; serialized, an object with fields in camel case.
///
/// # Examples
///
/// ```standalone_crate
/// use nexus::prelude::*;
///
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "user.created")]
/// struct UserCreated { email: String }
///
/// #[handler(max_attempts = 3)]
/// async fn send_welcome(user: UserCreated) {}
///
/// let description = App::discover().name("mailer").describe();
/// let handler = &description.handlers[0];
/// assert_eq!((handler.group.as_str(), handler.name.as_str()), ("mailer", "send_welcome"));
/// assert_eq!(handler.event_type, "user.created");
/// assert_eq!(handler.max_attempts, 3);
/// println!("{description}");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Description {
    /// The app's name.
    pub app: String,
    /// The handlers, `#[cron]` functions included, by group and name.
    pub handlers: Vec<HandlerDescription>,
    /// The event types that the app declares, by type and version.
    pub events: Vec<EventDescription>,
    /// The scheduled tasks, by name.
    pub schedules: Vec<ScheduleDescription>,
}

/// Where something is declared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Source {
    /// The crate, as it is called in paths.
    #[serde(rename = "crate")]
    pub crate_name: String,
    /// The path of the item in Rust.
    pub rust_path: String,
    /// The file, as the compiler names it: relative to the workspace, mostly.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
}

/// A handler, with all defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct HandlerDescription {
    /// The group; the app's name if the handler names none.
    pub group: String,
    /// The name within the group.
    pub name: String,
    /// Names that it had before.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub formerly: Vec<String>,
    /// What it is delivered of the event log when it is new: `beginning`, or a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The event type it takes; `tick.<app>.<name>` for `#[cron]` functions.
    pub event_type: String,
    /// The version of the event type.
    pub event_version: u32,
    /// Takes many events at once.
    pub batch: bool,
    /// Takes `&mut Tx`.
    pub transaction: bool,
    /// Attempts before a message is dead-lettered.
    pub max_attempts: u32,
    /// How long a failed attempt waits for the next one.
    pub backoff: Backoff,
    /// How long an attempt may take, in milliseconds.
    pub timeout_ms: u64,
    /// How many attempts run at once in a node.
    pub concurrency: usize,
    /// Where it is declared.
    pub source: Source,
}

/// How long failed attempts wait, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Backoff {
    /// After the first attempt.
    pub first_ms: u64,
    /// The ceiling; each wait before it is twice the one before.
    pub max_ms: u64,
}

/// An event type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct EventDescription {
    /// The stored name.
    pub event_type: String,
    /// The version of the schema.
    pub version: u32,
    /// A hash of what the JSON Schema accepts; titles, descriptions and the order of fields do not count.
    pub schema: String,
    /// Where it is declared.
    pub source: Source,
}

/// A scheduled task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct ScheduleDescription {
    /// The name, unique in the namespace.
    pub name: String,
    /// Names that it had before.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub formerly: Vec<String>,
    /// The cron expression as it is written.
    pub expression: String,
    /// IANA name.
    pub time_zone: String,
    /// What becomes of due times that no node was there to fire.
    #[serde(serialize_with = "as_text")]
    pub misfire: Misfire,
    /// How late a due time may be fired before it counts as missed, in milliseconds.
    pub grace_ms: u64,
    /// What happens when it is due.
    pub effect: TickEffect,
    /// Where it is declared.
    pub source: Source,
}

/// What happens when a scheduled task is due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub enum TickEffect {
    /// The `#[cron]` function of that name runs.
    Runs {
        /// Its group.
        group: String,
    },
    /// An event is emitted.
    #[serde(rename_all = "camelCase")]
    Emits {
        /// Its type.
        event_type: String,
        /// The version of its type.
        version: u32,
    },
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn as_text<S: serde::Serializer>(misfire: &Misfire, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(misfire)
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

impl From<Origin> for Source {
    fn from(origin: Origin) -> Self {
        Self {
            crate_name: origin.crate_name.to_owned(),
            rust_path: origin.rust_path.to_owned(),
            file: origin.file.to_owned(),
            line: origin.line,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}:{})", self.rust_path, self.file, self.line)
    }
}

impl App {
    /// Lists what the app is made of, with file and line, and every option as it is in force: what the
    /// linker has collected and [`only`](Self::only) and [`groups`](Self::groups) have kept.
    ///
    /// A crate that is missing here is not linked: name it once, with [`nexus::link!`](crate::link).
    /// The start logs the same, a line each, at level `debug`.
    #[must_use]
    pub fn describe(&self) -> Description {
        let selected = self.selected();
        let mut handlers: Vec<HandlerDescription> = self
            .routes(str::to_owned)
            .into_iter()
            .map(|route| HandlerDescription {
                name: route.name().to_owned(),
                formerly: texts(route.descriptor.formerly),
                from: route.descriptor.options.from.map(|from| from.to_string()),
                batch: route.descriptor.batch,
                transaction: route.descriptor.uses_tx,
                max_attempts: route.retry.max_attempts(),
                backoff: Backoff {
                    first_ms: millis(route.retry.delay_after(1)),
                    max_ms: millis(route.retry.delay_after(u32::MAX)),
                },
                timeout_ms: millis(route.timeout),
                concurrency: route.concurrency,
                source: route.descriptor.origin.into(),
                group: route.group,
                event_type: route.event_type,
                event_version: route.event_version,
            })
            .collect();
        handlers.sort_by(|a, b| (&a.group, &a.name).cmp(&(&b.group, &b.name)));

        let mut events: Vec<EventDescription> = selected
            .events
            .iter()
            .map(|event| EventDescription {
                event_type: event.meta.event_type.to_owned(),
                version: event.meta.version,
                schema: fingerprint((event.schema)().as_value()),
                source: event.meta.origin.into(),
            })
            .collect();
        events.sort_by(|a, b| (&a.event_type, a.version).cmp(&(&b.event_type, b.version)));

        let functions = selected.handlers.iter().filter_map(|handler| {
            let Trigger::Cron(cron) = &handler.trigger else {
                return None;
            };
            let group = handler.group.unwrap_or(&self.name).to_owned();
            let effect = TickEffect::Runs { group };
            Some(schedule(
                handler.name,
                handler.formerly,
                cron,
                effect,
                handler.origin,
            ))
        });
        let emitting = selected.tasks.iter().map(|task| {
            let effect = TickEffect::Emits {
                event_type: task.event.meta.event_type.to_owned(),
                version: task.event.meta.version,
            };
            schedule(
                task.name,
                task.formerly,
                &task.schedule,
                effect,
                task.origin,
            )
        });
        let mut schedules: Vec<ScheduleDescription> = functions.chain(emitting).collect();
        schedules.sort_by(|a, b| a.name.cmp(&b.name));
        Description {
            app: self.name.clone(),
            handlers,
            events,
            schedules,
        }
    }
}

fn schedule(
    name: &str,
    formerly: &[&str],
    cron: &CronDescriptor,
    effect: TickEffect,
    origin: Origin,
) -> ScheduleDescription {
    ScheduleDescription {
        name: name.to_owned(),
        formerly: texts(formerly),
        expression: cron.expression.to_owned(),
        time_zone: cron.time_zone.unwrap_or("UTC").to_owned(),
        misfire: cron.misfire.unwrap_or_default(),
        grace_ms: millis(cron.grace.unwrap_or(DEFAULT_GRACE)),
        effect,
        source: origin.into(),
    }
}

impl Description {
    /// How many handlers, event types and scheduled tasks came from which crates, in one line.
    pub(super) fn summary(&self) -> String {
        let handlers = count(
            self.handlers.iter().map(|handler| &handler.source),
            "handler",
        );
        let events = count(self.events.iter().map(|event| &event.source), "event type");
        let schedules = count(
            self.schedules.iter().map(|schedule| &schedule.source),
            "scheduled task",
        );
        format!("{handlers}; {events}; {schedules}")
    }

    /// A line for each handler, event type and scheduled task.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        let handlers = self
            .handlers
            .iter()
            .map(|handler| format!("handler {} of {}", cells(&handler.cells()), handler.source));
        let events = self
            .events
            .iter()
            .map(|event| format!("event type {} of {}", cells(&event.cells()), event.source));
        let schedules = self.schedules.iter().map(|schedule| {
            format!(
                "scheduled task {} of {}",
                cells(&schedule.cells()),
                schedule.source
            )
        });
        handlers.chain(events).chain(schedules)
    }
}

/// `3 handlers from billing (2), shipping (1)`.
fn count<'a>(sources: impl Iterator<Item = &'a Source>, what: &str) -> String {
    let mut crates: BTreeMap<&str, usize> = BTreeMap::new();
    for source in sources {
        *crates.entry(&source.crate_name).or_default() += 1;
    }
    let total: usize = crates.values().sum();
    let plural = if total == 1 { "" } else { "s" };
    if crates.is_empty() {
        return format!("no {what}s");
    }
    let from: Vec<String> = crates
        .iter()
        .map(|(name, count)| format!("{name} ({count})"))
        .collect();
    format!("{total} {what}{plural} from {}", from.join(", "))
}

fn cells(cells: &[String]) -> String {
    let there: Vec<&str> = cells
        .iter()
        .map(String::as_str)
        .filter(|cell| !cell.is_empty())
        .collect();
    there.join(", ")
}

fn formerly_text(formerly: &[String]) -> String {
    if formerly.is_empty() {
        String::new()
    } else {
        format!("formerly {}", formerly.join(", "))
    }
}

impl HandlerDescription {
    fn cells(&self) -> [String; 6] {
        let mode = match (self.batch, self.transaction) {
            (false, false) => "",
            (true, false) => "batch",
            (false, true) => "tx",
            (true, true) => "batch, tx",
        };
        let Backoff { first_ms, max_ms } = self.backoff;
        let (first, max) = (
            Duration::from_millis(first_ms),
            Duration::from_millis(max_ms),
        );
        [
            format!("{}/{}", self.group, self.name),
            format!("{} v{}", self.event_type, self.event_version),
            mode.to_owned(),
            format!("{} attempts, {first:?}..{max:?}", self.max_attempts),
            format!(
                "{:?}, {} at once",
                Duration::from_millis(self.timeout_ms),
                self.concurrency
            ),
            formerly_text(&self.formerly),
        ]
    }
}

impl EventDescription {
    fn cells(&self) -> [String; 2] {
        [
            format!("{} v{}", self.event_type, self.version),
            format!("schema {}", self.schema),
        ]
    }
}

impl ScheduleDescription {
    fn cells(&self) -> [String; 5] {
        [
            self.name.clone(),
            format!("{} {}", self.expression, self.time_zone),
            match &self.effect {
                TickEffect::Runs { group } => format!("runs {group}/{}", self.name),
                TickEffect::Emits {
                    event_type,
                    version,
                } => {
                    format!("emits {event_type} v{version}")
                }
            },
            format!(
                "{} after {:?}",
                self.misfire,
                Duration::from_millis(self.grace_ms)
            ),
            formerly_text(&self.formerly),
        ]
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "app {}", self.app)?;
        section(
            f,
            "handler",
            &[
                "handler",
                "takes",
                "",
                "retries",
                "limits",
                "",
                "declared by",
            ],
            self.handlers
                .iter()
                .map(|handler| (handler.cells().to_vec(), &handler.source)),
        )?;
        section(
            f,
            "event type",
            &["event type", "", "declared by"],
            self.events
                .iter()
                .map(|event| (event.cells().to_vec(), &event.source)),
        )?;
        section(
            f,
            "scheduled task",
            &["task", "when", "what", "misfire", "", "declared by"],
            self.schedules
                .iter()
                .map(|schedule| (schedule.cells().to_vec(), &schedule.source)),
        )
    }
}

/// A heading and a table whose columns are as wide as their widest cell; empty columns are left out.
fn section<'a>(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    header: &[&str],
    rows: impl Iterator<Item = (Vec<String>, &'a Source)>,
) -> fmt::Result {
    let mut table: Vec<Vec<String>> = vec![texts(header)];
    table.extend(rows.map(|(mut cells, source)| {
        cells.push(source.to_string());
        cells
    }));
    let count = table.len() - 1;
    let plural = if count == 1 { "" } else { "s" };
    writeln!(f, "\n{count} {what}{plural}")?;
    if table.len() == 1 {
        return Ok(());
    }
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let width = |row: &Vec<String>| row[column].chars().count();
            if table[1..].iter().all(|row| row[column].is_empty()) {
                0
            } else {
                table.iter().map(width).max().unwrap_or(0)
            }
        })
        .collect();
    for row in &table {
        let mut line = String::new();
        for (cell, &width) in row.iter().zip(&widths).filter(|(_, width)| **width > 0) {
            line.push_str("  ");
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}
