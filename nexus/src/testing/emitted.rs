use std::{ops::Deref, panic::Location, time::Duration};

use jiff::Timestamp;
use sqlx::Row;
use uuid::Uuid;

use super::{TestApp, settled};
use crate::event::Event;

/// An event as it stands in the log. It derefs to the event.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Emitted<E> {
    /// The event itself.
    pub event: E,
    /// Its id.
    pub event_id: i64,
    /// When it was emitted, by the clock of the database.
    pub emitted_at: Timestamp,
    /// The id of the node that emitted it; `scheduler` for ticks, `sql` for `core.emit`.
    pub producer_node_id: String,
    /// The entity that it is about.
    pub key: Option<String>,
    /// Shared by all events that follow from one cause.
    pub correlation_id: Option<String>,
    /// The id of the event whose handler emitted it.
    pub causation_id: Option<String>,
    /// The scheduled task that emitted it.
    pub scheduled_task_id: Option<Uuid>,
}

impl<E> Deref for Emitted<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.event
    }
}

impl TestApp {
    /// All events of a type and its version that were emitted in the app's namespace, by whomever, in the
    /// order of their ids.
    ///
    /// # Panics
    ///
    /// If one of them does not decode; the text says which and where.
    #[track_caller]
    pub fn emitted<E: Event>(&self) -> impl Future<Output = Vec<Emitted<E>>> {
        self.emitted_at(Location::caller())
    }

    /// The only event of a type that was emitted.
    ///
    /// # Panics
    ///
    /// If there is none, or there are more. The text lists them, what else was emitted, and what waits or was
    /// given up, with its errors: one of them may have been to emit it.
    #[track_caller]
    pub fn only_emitted<E: Event>(&self) -> impl Future<Output = Emitted<E>> {
        let at = Location::caller();
        async move {
            let mut events = self.emitted_at::<E>(at).await;
            match events.len() {
                1 => events.remove(0),
                0 => panic!(
                    "{at}: expected one `{}`, none was emitted; {}{}",
                    E::EVENT_TYPE,
                    self.log(at).await,
                    settled::report(self.database(), Duration::ZERO, at)
                        .await
                        .outlook()
                ),
                count => {
                    let found: Vec<String> = events
                        .iter()
                        .map(|found| {
                            let payload = serde_json::to_string(&found.event)
                                .unwrap_or_else(|error| error.to_string());
                            format!("event {}: {payload}", found.event_id)
                        })
                        .collect();
                    panic!(
                        "{at}: expected one `{}`, {count} were emitted:{}",
                        E::EVENT_TYPE,
                        settled::lines(&found)
                    )
                }
            }
        }
    }

    async fn emitted_at<E: Event>(&self, at: &Location<'_>) -> Vec<Emitted<E>> {
        let rows = sqlx::query(
            "select event_id, payload::text, (extract(epoch from emitted_at) * 1000000)::bigint,
                    producer_node_id, key, correlation_id, causation_id, scheduled_task_id
             from core.event_log
             where namespace = $1 and event_type = $2 and event_version = $3
             order by event_id",
        )
        .bind(self.client().namespace())
        .bind(E::EVENT_TYPE)
        .bind(i32::try_from(E::VERSION).unwrap_or(i32::MAX))
        .fetch_all(self.pool())
        .await
        .unwrap_or_else(|error| panic!("{at}: the event log cannot be read: {error}"));
        rows.iter()
            .map(|row| {
                let (event_id, payload): (i64, String) = (row.get(0), row.get(1));
                let deserializer = &mut serde_json::Deserializer::from_str(&payload);
                let event = serde_path_to_error::deserialize(deserializer).unwrap_or_else(|error| {
                    panic!(
                        "{at}: event {event_id} is no `{}` (version {}): at `{}`: {}, in {payload}",
                        E::EVENT_TYPE,
                        E::VERSION,
                        error.path(),
                        error.inner()
                    )
                });
                Emitted {
                    event,
                    event_id,
                    emitted_at: Timestamp::from_microsecond(row.get(2))
                        .expect("the database counts in the same years"),
                    producer_node_id: row.get(3),
                    key: row.get(4),
                    correlation_id: row.get(5),
                    causation_id: row.get(6),
                    scheduled_task_id: row.get(7),
                }
            })
            .collect()
    }

    /// What was emitted, for a text.
    async fn log(&self, at: &Location<'_>) -> String {
        let rows: Vec<(String, i32, i64)> = sqlx::query_as(
            "select event_type, event_version, count(*) from core.event_log
             where namespace = $1 group by 1, 2 order by 1, 2",
        )
        .bind(self.client().namespace())
        .fetch_all(self.pool())
        .await
        .unwrap_or_else(|error| panic!("{at}: the event log cannot be read: {error}"));
        if rows.is_empty() {
            return "nothing else was, either".to_owned();
        }
        let counts: Vec<String> = rows
            .into_iter()
            .map(|(event_type, version, count)| {
                format!("`{event_type}` version {version}: {count}")
            })
            .collect();
        format!("the log has {}", counts.join(", "))
    }
}
