//! Scheduled tasks at run time: looking after those that apps declare, and making others.

use std::{fmt, future::IntoFuture, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::Serialize;
use sqlx::{Acquire, PgConnection};
use uuid::Uuid;

use super::{Client, Lent};
use crate::{
    event::{EncodeError, Event, InvalidName, Outgoing, check_event_type, encode},
    schedule::{self, Misfire, Schedule},
    store::{
        maintenance,
        scheduled_tasks::{self, StoredTask, TaskRow},
    },
};

/// Longest name of a scheduled task, in bytes.
const LONGEST_NAME: usize = 100;

/// A cron expression that emits an event: one that an app declares (`#[cron]`), or one that was made at
/// run time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ScheduledTask {
    /// Its id; events that it emits carry it.
    pub id: Uuid,
    /// Its name, unique in the namespace.
    pub name: String,
    /// The app that declares it; `None` for a task that was made at run time or by SQL.
    pub app: Option<String>,
    /// When it is due.
    pub expression: String,
    /// IANA name of the time zone; `None` is UTC.
    pub time_zone: Option<String>,
    /// The event type that it emits.
    pub event_type: String,
    /// The version of that type.
    pub event_version: u32,
    /// What becomes of due times that no node was there to fire.
    pub misfire: Misfire,
    /// How late a due time may be and still be fired for itself.
    pub grace: Duration,
    /// Who fires it: `nexus` or `pg_cron`.
    pub scheduler: String,
    /// False if its app no longer declares it, if its next run could not be computed
    /// ([`last_error`](Self::last_error)), or if somebody set the column `active` to false.
    pub is_active: bool,
    /// Since when it has been paused; `None` if it is not.
    pub paused_at: Option<Timestamp>,
    /// When it is due next. `None` if it is inactive or paused, or was changed by SQL and no node has
    /// looked at it yet.
    pub next_run_at: Option<Timestamp>,
    /// When it last emitted, also by hand; `None` if it never did.
    pub last_run_at: Option<Timestamp>,
    /// Why a node made it inactive.
    pub last_error: Option<String>,
}

/// What became of a due time of a scheduled task, or of several in a row that were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskRun {
    /// When it was due; the time of the run for one by hand, the last due time for those that were left
    /// out.
    pub due_at: Timestamp,
    /// When it was fired, or left out.
    pub fired_at: Timestamp,
    /// The event that was emitted; `None` for due times that were left out.
    pub event_id: Option<i64>,
    /// Whether somebody ran it by hand.
    pub is_manual: bool,
    /// The due times that were left out by the task's [`Misfire`] policy.
    pub left_out: Option<LeftOut>,
}

/// Due times in a row that nobody fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftOut {
    /// The oldest of them.
    pub first: Timestamp,
    /// The newest of them.
    pub last: Timestamp,
    /// How many they are; `None` if more than a thousand.
    pub count: Option<u64>,
}

/// Why a scheduled task could not be made, changed or looked at. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The name cannot be one: up to 100 bytes without control characters.
    #[error(transparent)]
    Name(InvalidName),
    /// The cron expression cannot be read.
    #[error("cron expression `{expression}` is not valid: {reason}")]
    Expression {
        /// What was given.
        expression: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such date. Did you mean another month?
    #[error("cron expression `{expression}` never comes due")]
    Never {
        /// What was given.
        expression: String,
    },
    /// The time zone is not known. Use an IANA name such as `Europe/Berlin`.
    #[error("{reason}")]
    TimeZone {
        /// What was given.
        time_zone: String,
        /// That it is none, and what may be meant.
        reason: String,
    },
    /// The event type cannot be one; its text says what is accepted.
    #[error(transparent)]
    EventType(InvalidName),
    /// The event cannot be stored.
    #[error(transparent)]
    Event(#[from] EncodeError),
    /// Versions of events count from 1.
    #[error("versions of events count from 1, found 0")]
    EventVersion,
    /// [`Misfire::FireAll`] takes a cap from 1 to 1,000.
    #[error("{reason}")]
    Misfire {
        /// What was given, and what is accepted.
        reason: String,
    },
    /// An app declares a task of this name. Change it there, or use another name.
    #[error(
        "scheduled task `{name}` is declared by app `{app}`: change it there, or use another name"
    )]
    Declared {
        /// The task.
        name: String,
        /// The app.
        app: String,
    },
    /// The namespace has no task of this name.
    #[error("namespace `{namespace}` has no scheduled task `{name}`; it has {}", names(.known))]
    Unknown {
        /// The namespace.
        namespace: String,
        /// What was given.
        name: String,
        /// The tasks that there are.
        known: Vec<String>,
    },
    /// The task is inactive, so that it cannot be run. Mend what the reason says.
    #[error("scheduled task `{name}` is inactive: {reason}")]
    Inactive {
        /// The task.
        name: String,
        /// Why.
        reason: String,
    },
    /// The database could not be asked.
    #[error("could not {doing}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What went wrong.
        source: sqlx::Error,
    },
}

/// Up to twenty of them, for a message.
pub(super) fn names(known: &[String]) -> String {
    const SHOWN: usize = 20;
    match known {
        [] => "none".to_owned(),
        _ if known.len() > SHOWN => {
            format!(
                "{} and {} more",
                known[..SHOWN].join(", "),
                known.len() - SHOWN
            )
        }
        _ => known.join(", "),
    }
}

const STORING: &str = "store a scheduled task";

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> ScheduleError + Copy {
    move |source| ScheduleError::Database { doing, source }
}

/// Ends the work on a connection by what came of it. After an error of the database it is closed.
async fn end<T>(
    connection: Lent,
    done: Result<T, ScheduleError>,
    doing: &'static str,
) -> Result<T, ScheduleError> {
    match &done {
        Ok(_) => connection.give_back().await.map_err(failed(doing))?,
        Err(ScheduleError::Database { .. }) => drop(connection),
        Err(_) => connection.give_up().await,
    }
    done
}

impl From<schedule::ScheduleError> for ScheduleError {
    fn from(error: schedule::ScheduleError) -> Self {
        match error {
            schedule::ScheduleError::Expression { expression, reason } => {
                Self::Expression { expression, reason }
            }
            schedule::ScheduleError::TimeZone { time_zone, reason } => {
                Self::TimeZone { time_zone, reason }
            }
            schedule::ScheduleError::Never { expression } => Self::Never { expression },
        }
    }
}

/// A scheduled task about to be stored: set options, then await it for the task's id.
#[must_use = "a scheduled task is stored when this is awaited"]
pub struct Scheduling<'a> {
    client: &'a Client,
    connection: Option<&'a mut PgConnection>,
    name: String,
    expression: String,
    time_zone: Option<String>,
    misfire: Misfire,
    grace: Duration,
    event: Result<Outgoing, ScheduleError>,
}

impl Scheduling<'_> {
    /// The IANA time zone that the expression counts in, such as `Europe/Berlin`; default UTC.
    pub fn tz(mut self, time_zone: impl Into<String>) -> Self {
        self.time_zone = Some(time_zone.into());
        self
    }

    /// What becomes of due times that no node was there to fire; default [`Misfire::FireOnce`].
    pub fn misfire(mut self, misfire: Misfire) -> Self {
        self.misfire = misfire;
        self
    }

    /// How late a due time may be and still be fired for itself; default 60 s, counted in milliseconds.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// The version of the event type, for [`Client::schedule_json`]; default 1. Typed events have
    /// theirs.
    pub fn event_version(mut self, version: u32) -> Self {
        if let Ok(event) = &mut self.event {
            event.event_version = version;
        }
        self
    }

    /// The entity that the event is about, for [`Client::schedule_json`]; default none. Typed events
    /// have theirs.
    pub fn event_key(mut self, key: impl Into<String>) -> Self {
        if let Ok(event) = &mut self.event {
            event.key = Some(key.into());
        }
        self
    }

    async fn store(mut self) -> Result<Uuid, ScheduleError> {
        if let Some(connection) = self.connection.take() {
            return self.store_in(connection).await;
        }
        let client = self.client;
        let stored = async {
            let mut connection = client.lend().await.map_err(failed(STORING))?;
            let stored = self.store_in(&mut connection).await;
            end(connection, stored, STORING).await
        };
        client.answered(failed(STORING), stored).await
    }

    async fn store_in(self, connection: &mut PgConnection) -> Result<Uuid, ScheduleError> {
        let doing = STORING;
        check_task_name(&self.name)?;
        let event = self.event?;
        if event.event_version == 0 {
            return Err(ScheduleError::EventVersion);
        }
        event.check(self.client.inner.limits.payload_bytes)?;
        self.misfire
            .check()
            .map_err(|error| ScheduleError::Misfire {
                reason: error.to_string(),
            })?;
        let schedule = read(&self.name, &self.expression, self.time_zone.as_deref())?;
        let now = scheduled_tasks::now(connection)
            .await
            .map_err(failed(doing))?;
        let task = TaskRow {
            next_run_at: schedule.next_after(now)?,
            name: self.name,
            expression: self.expression,
            time_zone: self.time_zone,
            event_type: event.event_type,
            event_version: event.event_version,
            payload: event.payload,
            key: event.key,
            misfire: self.misfire,
            grace: self.grace,
        };
        let namespace = self.client.namespace();
        scheduled_tasks::store(connection, namespace, None, std::slice::from_ref(&task))
            .await
            .map_err(failed(doing))?;
        let stored = self.client.task(connection, &task.name, doing).await?;
        match stored.app {
            Some(app) => Err(ScheduleError::Declared {
                name: task.name,
                app,
            }),
            None => Ok(stored.task_id),
        }
    }
}

impl<'a> IntoFuture for Scheduling<'a> {
    type Output = Result<Uuid, ScheduleError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.store())
    }
}

impl fmt::Debug for Scheduling<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduling")
            .field("name", &self.name)
            .field("expression", &self.expression)
            .finish_non_exhaustive()
    }
}

/// Accepts what `#[cron]` accepts, and says the same of the rest.
fn read(name: &str, expression: &str, time_zone: Option<&str>) -> Result<Schedule, ScheduleError> {
    let refused = |reason| ScheduleError::Expression {
        expression: expression.to_owned(),
        reason,
    };
    let mistakes = schedule::mistakes(expression);
    if mistakes.is_some() && schedule::mistakes(name).is_none() {
        return Err(refused(format!(
            "`{name}` could be one, and stands in the place of the name: the name comes first"
        )));
    }
    let schedule = Schedule::parse(expression, time_zone)?;
    if let Some(mistakes) = mistakes {
        // What never comes due has an error of its own.
        schedule.next_after(Timestamp::now())?;
        return Err(refused(mistakes));
    }
    if let Some((zone, reason)) =
        time_zone.and_then(|zone| Some((zone, schedule::zone_mistake(zone)?)))
    {
        return Err(ScheduleError::TimeZone {
            time_zone: zone.to_owned(),
            reason,
        });
    }
    Ok(schedule)
}

fn check_task_name(name: &str) -> Result<(), ScheduleError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > LONGEST_NAME {
        "it is longer than 100 bytes"
    } else if name.chars().any(char::is_control) {
        "it holds a control character"
    } else {
        return Ok(());
    };
    let refused = InvalidName::new("the name of a scheduled task", name, reason);
    Err(ScheduleError::Name(refused))
}

/// Scheduled tasks. Those that apps declare are listed, paused, resumed and run here; others are made.
impl Client {
    /// Emits `event` by the clock, until it is [unscheduled](Self::unschedule); await it for the id of
    /// the task.
    ///
    /// The expression has five fields, six with seconds first, or is a name such as `@hourly`. It is
    /// checked here. Events are emitted by whichever node of the namespace gets to it, with the due time
    /// in [`EnvelopeMeta::due_at`](crate::EnvelopeMeta::due_at), once for each due time in the cluster.
    ///
    /// The name is the task's identity: the same name again changes the task, so that a program may say
    /// the same at each start. A task whose expression and zone did not change keeps its next run, one
    /// that is paused stays so. The task belongs to no app and outlives deployments. Running nodes
    /// notice it within half a second.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct ReportDue { customer: u64 }
    /// # async fn example(client: &Client) -> nexus::Result {
    /// client
    ///     .schedule("report-7", "0 9 * * 1-5", &ReportDue { customer: 7 })
    ///     .tz("Europe/Berlin")
    ///     .misfire(nexus::Misfire::Skip)
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Awaiting it returns a [`ScheduleError`]; nothing was stored then.
    pub fn schedule<E: Event>(
        &self,
        name: impl Into<String>,
        expression: impl Into<String>,
        event: &E,
    ) -> Scheduling<'_> {
        let event = Outgoing::new(event, self.inner.limits.payload_bytes);
        self.scheduling(name, expression, event.map_err(Into::into))
    }

    /// [`schedule`](Self::schedule) with a transaction of yours: the task is there once you commit.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct ReportDue { customer: u64 }
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let mut tx = client.begin().await?;
    /// sqlx::query("insert into customers (id) values (7)").execute(&mut *tx).await?;
    /// client.schedule_in(&mut tx, "report-7", "0 9 * * 1-5", &ReportDue { customer: 7 }).await?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn schedule_in<'a, E: Event>(
        &'a self,
        connection: &'a mut PgConnection,
        name: impl Into<String>,
        expression: impl Into<String>,
        event: &E,
    ) -> Scheduling<'a> {
        Scheduling {
            connection: Some(connection),
            ..self.schedule(name, expression, event)
        }
    }

    /// [`schedule`](Self::schedule) for an event type that the program has no Rust type for.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let payload = serde_json::json!({ "limit": 100 });
    /// client.schedule_json("cleanup", "*/5 * * * *", "maintenance.cleanup", &payload).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn schedule_json<T: Serialize + ?Sized>(
        &self,
        name: impl Into<String>,
        expression: impl Into<String>,
        event_type: impl Into<String>,
        payload: &T,
    ) -> Scheduling<'_> {
        let event_type = event_type.into();
        let event = check_event_type(&event_type)
            .map_err(ScheduleError::EventType)
            .and_then(|()| {
                Ok(encode(
                    &event_type,
                    payload,
                    self.inner.limits.payload_bytes,
                )?)
            })
            .map(|payload| Outgoing::of_json(event_type, 1, payload));
        self.scheduling(name, expression, event)
    }

    fn scheduling(
        &self,
        name: impl Into<String>,
        expression: impl Into<String>,
        event: Result<Outgoing, ScheduleError>,
    ) -> Scheduling<'_> {
        Scheduling {
            client: self,
            connection: None,
            name: name.into(),
            expression: expression.into(),
            time_zone: None,
            misfire: Misfire::default(),
            grace: schedule::DEFAULT_GRACE,
            event,
        }
    }

    /// Removes a task that was made at run time, or that its app no longer declares, with its history.
    /// Returns whether there was one.
    ///
    /// Events that it has emitted are handled all the same.
    ///
    /// # Errors
    ///
    /// An app declares the task: remove it from the program, or [pause](Self::pause_schedule) it. Or the
    /// database could not be asked.
    pub async fn unschedule(&self, name: &str) -> Result<bool, ScheduleError> {
        let doing = "remove a scheduled task";
        let removed = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let removed = self.remove_schedule(&mut connection, name, doing).await;
            end(connection, removed, doing).await
        };
        self.answered(failed(doing), removed).await
    }

    async fn remove_schedule(
        &self,
        connection: &mut PgConnection,
        name: &str,
        doing: &'static str,
    ) -> Result<bool, ScheduleError> {
        let is_removed = scheduled_tasks::remove(connection, self.namespace(), name)
            .await
            .map_err(failed(doing))?;
        if is_removed {
            return Ok(true);
        }
        match self.task(connection, name, doing).await {
            Ok(StoredTask {
                name,
                app: Some(app),
                ..
            }) => Err(ScheduleError::Declared { name, app }),
            // Made again since.
            Ok(_) | Err(ScheduleError::Unknown { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every scheduled task of the namespace, in the order of their names.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// for task in client.schedules().await? {
    ///     println!("{} {} next {:?}", task.name, task.expression, task.next_run_at);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn schedules(&self) -> Result<Vec<ScheduledTask>, ScheduleError> {
        let doing = "list scheduled tasks";
        let listed = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let listed = scheduled_tasks::list(&mut connection, self.namespace(), None).await;
            end(connection, listed.map_err(failed(doing)), doing).await
        };
        let tasks = self.answered(failed(doing), listed).await?;
        Ok(tasks
            .into_iter()
            .map(|task| ScheduledTask {
                id: task.task_id,
                name: task.name,
                app: task.app,
                expression: task.expression,
                time_zone: task.time_zone,
                event_type: task.event_type,
                event_version: task.event_version,
                misfire: task.misfire,
                grace: task.grace,
                scheduler: task.scheduler,
                is_active: task.active,
                paused_at: task.paused_at,
                next_run_at: task
                    .next_run_at
                    .filter(|_| task.active && task.paused_at.is_none()),
                last_run_at: task.last_run_at,
                last_error: task.last_error,
            })
            .collect())
    }

    /// Pauses a task, one of an app or any other, until it is [resumed](Self::resume_schedule): neither
    /// deployments nor restarts do that. A task that is paused stays so.
    ///
    /// A tick that a node is firing at this moment is still fired; after the return none is.
    ///
    /// # Errors
    ///
    /// There is no such task, or the database could not be asked.
    pub async fn pause_schedule(&self, name: &str) -> Result<(), ScheduleError> {
        let doing = "pause a scheduled task";
        let paused = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let paused = match scheduled_tasks::pause(&mut connection, self.namespace(), name).await
            {
                Ok(true) => Ok(()),
                Ok(false) => Err(self.unknown(&mut connection, name, doing).await),
                Err(error) => Err(failed(doing)(error)),
            };
            end(connection, paused, doing).await
        };
        self.answered(failed(doing), paused).await
    }

    /// Lets a paused task go on from its next due time. What came due while it was paused is not fired,
    /// whatever its misfire policy. A task that is not paused goes on as it was.
    ///
    /// # Errors
    ///
    /// There is no such task, its next run cannot be computed (it stays paused then), or the database
    /// could not be asked.
    pub async fn resume_schedule(&self, name: &str) -> Result<(), ScheduleError> {
        let doing = "resume a scheduled task";
        let resumed = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let resumed = self.resume_task(&mut connection, name, doing).await;
            end(connection, resumed, doing).await
        };
        self.answered(failed(doing), resumed).await
    }

    async fn resume_task(
        &self,
        connection: &mut PgConnection,
        name: &str,
        doing: &'static str,
    ) -> Result<(), ScheduleError> {
        let wrong = failed(doing);
        let mut tx = connection.begin().await.map_err(wrong)?;
        // A deployment may be changing its expression.
        scheduled_tasks::lock(&mut tx, self.namespace(), name)
            .await
            .map_err(wrong)?;
        let task = self.task(&mut tx, name, doing).await?;
        let now = scheduled_tasks::now(&mut tx).await.map_err(wrong)?;
        let schedule = Schedule::parse(&task.expression, task.time_zone.as_deref())?;
        scheduled_tasks::resume(&mut tx, task.task_id, schedule.next_after(now)?)
            .await
            .map_err(wrong)?;
        tx.commit().await.map_err(wrong)
    }

    /// Emits the event of a task now and returns its id. The due times of the task stay as they are; in
    /// its [history](Self::schedule_history) the run counts as one by hand.
    ///
    /// A paused task is run, too: who pauses a task may want to try it.
    ///
    /// # Errors
    ///
    /// There is no such task, it is inactive, or the database could not be asked.
    pub async fn run_schedule_now(&self, name: &str) -> Result<i64, ScheduleError> {
        let doing = "run a scheduled task";
        let run = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let run = self.run_task(&mut connection, name, doing).await;
            end(connection, run, doing).await
        };
        let (event_id, queues) = self.answered(failed(doing), run).await?;
        self.wake(queues);
        Ok(event_id)
    }

    async fn run_task(
        &self,
        connection: &mut PgConnection,
        name: &str,
        doing: &'static str,
    ) -> Result<(i64, Vec<String>), ScheduleError> {
        let task = self.task(connection, name, doing).await?;
        if !task.active {
            let reason = match (task.last_error, task.removed_at, task.app) {
                (Some(error), _, _) => error,
                (_, Some(_), Some(app)) => format!("app `{app}` no longer declares it"),
                _ => "somebody set `active` to false in core.scheduled_tasks".to_owned(),
            };
            return Err(ScheduleError::Inactive {
                name: task.name,
                reason,
            });
        }
        let mut run = run_now(connection, task.task_id).await;
        if let Err(error) = &run
            && maintenance::mend(connection, self.namespace(), error)
                .await
                .map_err(failed(doing))?
        {
            run = run_now(connection, task.task_id).await;
        }
        match run.map_err(failed(doing))? {
            Some(done) => Ok(done),
            None => Err(self.unknown(connection, name, doing).await),
        }
    }

    /// The newest runs of a task, at most `limit`, newest first: when it was due, when it was fired,
    /// which event it emitted, and which due times were left out. Kept for 30 days.
    ///
    /// # Errors
    ///
    /// There is no such task, or the database could not be asked.
    pub async fn schedule_history(
        &self,
        name: &str,
        limit: u32,
    ) -> Result<Vec<TaskRun>, ScheduleError> {
        let doing = "read the history of a scheduled task";
        let read = async {
            let mut connection = self.lend().await.map_err(failed(doing))?;
            let read = match self.task(&mut connection, name, doing).await {
                Ok(task) => scheduled_tasks::history(&mut connection, task.task_id, limit.into())
                    .await
                    .map_err(failed(doing)),
                Err(error) => Err(error),
            };
            end(connection, read, doing).await
        };
        let ticks = self.answered(failed(doing), read).await?;
        Ok(ticks
            .into_iter()
            .map(|tick| TaskRun {
                due_at: tick.due_at,
                fired_at: tick.fired_at,
                event_id: tick.event_id,
                is_manual: tick.is_manual,
                left_out: tick.left_out_from.map(|first| LeftOut {
                    first,
                    last: tick.due_at,
                    count: tick.left_out.map(i64::unsigned_abs),
                }),
            })
            .collect())
    }

    async fn task(
        &self,
        connection: &mut PgConnection,
        name: &str,
        doing: &'static str,
    ) -> Result<StoredTask, ScheduleError> {
        let found = scheduled_tasks::list(connection, self.namespace(), Some(name))
            .await
            .map_err(failed(doing))?;
        match found.into_iter().next() {
            Some(task) => Ok(task),
            None => Err(self.unknown(connection, name, doing).await),
        }
    }

    async fn unknown(
        &self,
        connection: &mut PgConnection,
        name: &str,
        doing: &'static str,
    ) -> ScheduleError {
        match scheduled_tasks::list(connection, self.namespace(), None).await {
            Ok(tasks) => ScheduleError::Unknown {
                namespace: self.namespace().to_owned(),
                name: name.to_owned(),
                known: tasks.into_iter().map(|task| task.name).collect(),
            },
            Err(source) => failed(doing)(source),
        }
    }
}

/// Runs a task in a savepoint, if the connection is in a transaction: so what is missing can be made again
/// and the run repeated.
async fn run_now(
    connection: &mut PgConnection,
    task_id: Uuid,
) -> sqlx::Result<Option<(i64, Vec<String>)>> {
    let mut tx = connection.begin().await?;
    let run = scheduled_tasks::run_now(&mut tx, task_id).await?;
    tx.commit().await?;
    Ok(run)
}
