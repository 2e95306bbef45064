//! The names that databases know an app by, as a file beside its source.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{App, describe::TickEffect};

/// The names that databases know an app by, from [`App::catalogue`].
///
/// Events are stored under their type, messages wait for a group and a handler, a scheduled task keeps
/// its history under its name. All of them follow the Rust names where nothing else is said: rename a
/// function, and what waits for it waits for ever. A catalogue that is committed and compared by a test
/// (`nexus::testing::assert_catalogue`) shows that before it happens.
///
/// It holds fingerprints of schemas and not the schemas, so that it stays a list which is read in a
/// review; and no file or line, so that moving code changes nothing.
///
/// # Examples
///
/// ```standalone_crate
/// use nexus::{app::Catalogue, prelude::*};
///
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "user.created")]
/// struct UserCreated { email: String }
///
/// #[handler]
/// async fn send_welcome(user: UserCreated) {}
///
/// let catalogue = App::discover().name("mailer").catalogue();
/// let committed: Catalogue = catalogue.to_string().parse().unwrap();
/// assert!(catalogue.differences(&committed).is_empty());
///
/// // Where the function was called `greet` when the file was written:
/// let committed: Catalogue = catalogue.to_string().replace("send_welcome", "greet").parse().unwrap();
/// let differences = catalogue.differences(&committed);
/// assert!(differences[0].to_string().contains(r#"write `formerly = "greet"`"#));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    app: String,
    events: Vec<EventEntry>,
    handlers: Vec<HandlerEntry>,
    schedules: Vec<ScheduleEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventEntry {
    #[serde(rename = "type")]
    event_type: String,
    version: u32,
    schema: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HandlerEntry {
    group: String,
    name: String,
    event: String,
    version: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    formerly: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleEntry {
    name: String,
    expression: String,
    #[serde(rename = "timeZone")]
    time_zone: String,
    /// What is emitted when it is due; `None` runs the function of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    emits: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    formerly: Vec<String>,
}

/// Why a text is no [`Catalogue`]. Write the file again.
#[derive(Debug, thiserror::Error)]
#[error("not a catalogue of nexus")]
pub struct CatalogueError {
    #[from]
    source: serde_json::Error,
}

/// Where an app is not what its committed [`Catalogue`] says; its text says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    text: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl App {
    /// The names that databases know the app by.
    #[must_use]
    pub fn catalogue(&self) -> Catalogue {
        let description = self.describe();
        // The ticks of a function are named for it, which its schedule says already.
        let event_of = |handler: &super::HandlerDescription| {
            if handler.event_type.starts_with("tick.") {
                "tick".to_owned()
            } else {
                handler.event_type.clone()
            }
        };
        Catalogue {
            app: description.app,
            events: description
                .events
                .into_iter()
                .map(|event| EventEntry {
                    event_type: event.event_type,
                    version: event.version,
                    schema: event.schema,
                })
                .collect(),
            handlers: description
                .handlers
                .into_iter()
                .map(|handler| HandlerEntry {
                    event: event_of(&handler),
                    group: handler.group,
                    name: handler.name,
                    version: handler.event_version,
                    formerly: handler.formerly,
                })
                .collect(),
            schedules: description
                .schedules
                .into_iter()
                .map(|schedule| ScheduleEntry {
                    name: schedule.name,
                    expression: schedule.expression,
                    time_zone: schedule.time_zone,
                    emits: match schedule.effect {
                        TickEffect::Runs { .. } => None,
                        TickEffect::Emits {
                            event_type,
                            version,
                        } => Some(format!("{event_type} v{version}")),
                    },
                    formerly: schedule.formerly,
                })
                .collect(),
        }
    }
}

/// Pretty JSON in a stable order, with a line break at the end.
impl fmt::Display for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = serde_json::to_string_pretty(self).expect("a catalogue has a JSON form");
        writeln!(f, "{text}")
    }
}

impl std::str::FromStr for Catalogue {
    type Err = CatalogueError;

    fn from_str(text: &str) -> Result<Self, CatalogueError> {
        Ok(serde_json::from_str(text)?)
    }
}

impl Catalogue {
    /// What has changed since `committed` was written, and what to do about it.
    #[must_use]
    pub fn differences(&self, committed: &Self) -> Vec<Difference> {
        let mut texts = Vec::new();
        if self.app != committed.app {
            texts.push(format!(
                "the app `{}` is called `{}` now: its handlers without a group are in another group, what waits in the old one stays there. Keep the name by `App::name(\"{}\")`",
                committed.app, self.app, committed.app
            ));
        }
        self.differing_events(committed, &mut texts);
        self.differing_handlers(committed, &mut texts);
        self.differing_schedules(committed, &mut texts);
        texts.into_iter().map(|text| Difference { text }).collect()
    }

    fn differing_events(&self, committed: &Self, texts: &mut Vec<String>) {
        let label =
            |event: &EventEntry| format!("`{}` version {}", event.event_type, event.version);
        let Compared {
            gone,
            mut new,
            both,
        } = compare(&committed.events, &self.events, |event| {
            (event.event_type.clone(), event.version)
        });
        for old in gone {
            let renamed = take_nearest(&mut new, &old.event_type, |new| {
                (new.schema == old.schema && new.version == old.version).then_some(&new.event_type)
            });
            texts.push(match renamed {
                Some(new) => format!(
                    "event type {} is gone, and `{}` is new with the same schema. What is stored keeps the old name, and what subscribed to it gets nothing more. If only the Rust type was renamed, write `#[event(type = \"{}\")]`",
                    label(old),
                    new.event_type,
                    old.event_type
                ),
                None => format!(
                    "event type {} is gone: handlers of it in other programs get nothing more, and messages of it that wait cannot be handled here",
                    label(old)
                ),
            });
        }
        for new in new {
            texts.push(format!("event type {} is new", label(new)));
        }
        for (old, new) in both {
            if old.schema != new.schema {
                texts.push(format!(
                    "event type {} has another schema. If what is stored under the old one does not decode any more, write `version = {}`",
                    label(old),
                    old.version.saturating_add(1)
                ));
            }
        }
    }

    fn differing_handlers(&self, committed: &Self, texts: &mut Vec<String>) {
        let label =
            |handler: &HandlerEntry| format!("`{}` of group `{}`", handler.name, handler.group);
        let Compared {
            gone,
            mut new,
            both,
        } = compare(&committed.handlers, &self.handlers, |handler| {
            (handler.group.clone(), handler.name.clone())
        });
        for old in gone {
            let says_so = take_nearest(&mut new, &old.name, |new| {
                (new.group == old.group && new.formerly.contains(&old.name)).then_some(&new.name)
            });
            if let Some(new) = says_so {
                texts.push(format!(
                    "handler {} is `{}` now, as `formerly` says: its messages go with it",
                    label(old),
                    new.name
                ));
                continue;
            }
            let renamed = take_nearest(&mut new, &old.name, |new| {
                (new.event == old.event && new.group == old.group).then_some(&new.name)
            });
            let regrouped = if renamed.is_some() {
                None
            } else {
                take_nearest(&mut new, &old.group, |new| {
                    (new.event == old.event && new.name == old.name).then_some(&new.group)
                })
            };
            texts.push(if let Some(new) = renamed {
                format!(
                    "handler {} is gone, and `{}` is new for the same event. If it is the same handler, write `formerly = \"{}\"`, or `name = \"{}\"` to keep the name: else what waits for `{}` stays where it is",
                    label(old), new.name, old.name, old.name, old.name
                )
            } else if let Some(new) = regrouped {
                format!(
                    "handler {} is in group `{}` now: what waits for it in group `{}` stays where it is, and nobody handles it",
                    label(old), new.group, old.group
                )
            } else {
                format!(
                    "handler {} is gone: what waits for it, and what will be sent to it, stays in its queue",
                    label(old)
                )
            });
        }
        for new in new {
            texts.push(format!(
                "handler {} is new: it gets what is emitted after its first start",
                label(new)
            ));
        }
        for (old, new) in both {
            if old.event != new.event {
                texts.push(format!(
                    "handler {} takes `{}` now, and no longer `{}`: messages of the old type that wait for it become dead letters. Give it another `name` to keep them apart",
                    label(old), new.event, old.event
                ));
            } else if old.version != new.version {
                texts.push(format!(
                    "handler {} takes version {} of `{}` now: messages of version {} wait until a build takes them",
                    label(old), new.version, old.event, old.version
                ));
            } else if old.formerly != new.formerly {
                texts.push(format!("handler {} has another `formerly`", label(old)));
            }
        }
    }

    fn differing_schedules(&self, committed: &Self, texts: &mut Vec<String>) {
        let Compared {
            gone,
            mut new,
            both,
        } = compare(&committed.schedules, &self.schedules, |schedule| {
            schedule.name.clone()
        });
        let same_time = |a: &ScheduleEntry, b: &ScheduleEntry| {
            (&a.expression, &a.time_zone) == (&b.expression, &b.time_zone)
        };
        for old in gone {
            let says_so = take_nearest(&mut new, &old.name, |new| {
                new.formerly.contains(&old.name).then_some(&new.name)
            });
            let renamed = says_so.or_else(|| {
                take_nearest(&mut new, &old.name, |new| {
                    same_time(old, new).then_some(&new.name)
                })
            });
            texts.push(match renamed {
                Some(new) if new.formerly.contains(&old.name) => format!(
                    "scheduled task `{}` is `{}` now, as `formerly` says: its history goes with it",
                    old.name, new.name
                ),
                Some(new) => format!(
                    "scheduled task `{}` is gone, and `{}` is new for the same times. If it is the same task, write `formerly = \"{}\"`, or `name = \"{}\"` to keep the name",
                    old.name, new.name, old.name, old.name
                ),
                None => format!(
                    "scheduled task `{}` is gone: it does not fire any more",
                    old.name
                ),
            });
        }
        for new in new {
            texts.push(format!("scheduled task `{}` is new", new.name));
        }
        for (old, new) in both {
            if !same_time(old, new) {
                texts.push(format!(
                    "scheduled task `{}` is due by `{}` in {} now, and no longer by `{}` in {}",
                    old.name, new.expression, new.time_zone, old.expression, old.time_zone
                ));
            }
            if old.emits != new.emits {
                let effect = |schedule: &ScheduleEntry| match &schedule.emits {
                    Some(event) => format!("emits {event}"),
                    None => "runs a function of its name".to_owned(),
                };
                texts.push(format!(
                    "scheduled task `{}` {} now; the file says that it {}",
                    old.name,
                    effect(new),
                    effect(old)
                ));
            }
            if old.formerly != new.formerly {
                texts.push(format!(
                    "scheduled task `{}` has another `formerly`",
                    old.name
                ));
            }
        }
    }
}

/// Entries by whether they are in the old list, in the new one, or in both.
struct Compared<'a, T> {
    gone: Vec<&'a T>,
    new: Vec<&'a T>,
    both: Vec<(&'a T, &'a T)>,
}

/// Takes out of `new` what the old entry most likely is now: of those that have a `name` the one whose is
/// most like the old one.
fn take_nearest<'a, T>(
    new: &mut Vec<&'a T>,
    old: &str,
    name: impl Fn(&'a T) -> Option<&'a String>,
) -> Option<&'a T> {
    let likeness =
        |entry: &&'a T| name(entry).map(|name| strsim::normalized_damerau_levenshtein(old, name));
    let alike = new.iter().enumerate();
    let alike = alike.filter_map(|(index, entry)| Some((likeness(entry)?, index)));
    let (_, index) = alike.max_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(new.remove(index))
}

fn compare<'a, T, K: Ord>(old: &'a [T], new: &'a [T], key: impl Fn(&T) -> K) -> Compared<'a, T> {
    let mut unmatched: BTreeMap<K, &T> = new.iter().map(|entry| (key(entry), entry)).collect();
    let (mut gone, mut both) = (Vec::new(), Vec::new());
    for entry in old {
        match unmatched.remove(&key(entry)) {
            Some(new) => both.push((entry, new)),
            None => gone.push(entry),
        }
    }
    Compared {
        gone,
        new: unmatched.into_values().collect(),
        both,
    }
}
