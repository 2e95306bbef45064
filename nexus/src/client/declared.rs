//! Event types as apps have declared them, and payloads that are held to them.

use jiff::Timestamp;
use serde_json::Value;

use super::{
    Client, Emission, Emissions, OperateError, PayloadProblems, inheriting, schedules::names,
};
use crate::{
    event::{EncodeError, InvalidName, Misfit, Outgoing, check_event_type, check_payload, encode},
    store::subscriptions,
};

/// An event type in one version, as an app declares it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeclaredType {
    /// The stored name of the type.
    pub event_type: String,
    /// The version.
    pub version: u32,
    /// The app.
    pub app: String,
    /// The JSON Schema of the payload.
    pub schema: Value,
    /// Since when the app has declared it so.
    pub registered_at: Timestamp,
}

/// Why a payload cannot be emitted as an event of that type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError {
    /// No app of the namespace has declared the type. Is its name right? Else start a build that has it.
    #[error("no app of namespace `{namespace}` has declared event type `{event_type}`; declared are {}", names(.known))]
    UnknownType {
        /// The namespace.
        namespace: String,
        /// What was given.
        event_type: String,
        /// The types that there are.
        known: Vec<String>,
    },
    /// The type is declared in other versions.
    #[error("event type `{event_type}` has no version {version}; it has {}", versions(.known))]
    UnknownVersion {
        /// The type.
        event_type: String,
        /// What was given.
        version: u32,
        /// The versions that there are.
        known: Vec<u32>,
    },
    /// The declared schema cannot be used to check anything. Mend the type's `JsonSchema`.
    #[error("the schema of event type `{event_type}` version {version} cannot be used: {why}")]
    UnusableSchema {
        /// The type.
        event_type: String,
        /// The version.
        version: u32,
        /// What is wrong with it.
        why: String,
    },
    /// The payload does not fit the declared schema.
    #[error("the payload does not fit event type `{event_type}` version {version}: {problems}")]
    Misfit {
        /// The type.
        event_type: String,
        /// The version.
        version: u32,
        /// What does not fit, and where.
        problems: PayloadProblems,
    },
    /// No event type is called so; the text says what is accepted.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Versions of events count from 1.
    #[error("versions of events count from 1 to 2147483647, found {version}")]
    Version {
        /// What was given.
        version: u32,
    },
    /// The payload has no form that can be stored.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The database could not be asked.
    #[error(transparent)]
    Operate(#[from] OperateError),
}

fn versions(known: &[u32]) -> String {
    let known: Vec<String> = known.iter().map(ToString::to_string).collect();
    names(&known)
}

impl Client {
    /// The event types that apps of the namespace have declared, also apps that do not run any more: by
    /// type, newest version first, latest declaration first.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn event_types(&self) -> Result<Vec<DeclaredType>, OperateError> {
        self.declared(None).await
    }

    async fn declared(&self, event_type: Option<&str>) -> Result<Vec<DeclaredType>, OperateError> {
        let listed = async {
            let mut connection = self.lend().await?;
            let namespace = self.namespace();
            let rows = subscriptions::declared(&mut connection, namespace, event_type).await?;
            connection.give_back().await?;
            Ok(rows)
        };
        let rows = self.asked("list event types", listed).await?;
        Ok(rows
            .into_iter()
            .map(|row| DeclaredType {
                event_type: row.event_type,
                version: row.version.unsigned_abs(),
                app: row.app,
                schema: row.schema,
                registered_at: row.registered_at,
            })
            .collect())
    }

    /// Checks a payload against the JSON Schema that an app has declared for the event type, and returns the
    /// version that it fits. Emits nothing.
    ///
    /// `version` is the newest declared one if it is `None`. Where several apps declare the version, the
    /// latest declaration counts.
    ///
    /// # Errors
    ///
    /// [`PayloadError`] says what does not fit, and where in the payload.
    pub async fn check_json(
        &self,
        event_type: &str,
        version: Option<u32>,
        payload: &Value,
    ) -> Result<u32, PayloadError> {
        check_event_type(event_type)?;
        let declared = self.declared(Some(event_type)).await?;
        if declared.is_empty() {
            let declared = self.event_types().await?.into_iter();
            let mut known: Vec<String> = declared.map(|declared| declared.event_type).collect();
            known.dedup();
            return Err(PayloadError::UnknownType {
                namespace: self.namespace().to_owned(),
                event_type: event_type.to_owned(),
                known,
            });
        }
        let mut known: Vec<u32> = declared.iter().map(|declared| declared.version).collect();
        let meant = declared
            .into_iter()
            .find(|declared| version.is_none_or(|version| version == declared.version));
        let Some(declared) = meant else {
            known.dedup();
            return Err(PayloadError::UnknownVersion {
                event_type: event_type.to_owned(),
                version: version.unwrap_or_default(),
                known,
            });
        };
        let version = declared.version;
        check_payload(declared.schema, payload).map_err(|misfit| {
            let event_type = event_type.to_owned();
            match misfit {
                Misfit::Schema(why) => PayloadError::UnusableSchema {
                    event_type,
                    version,
                    why,
                },
                Misfit::Payload(problems) => PayloadError::Misfit {
                    event_type,
                    version,
                    problems: PayloadProblems::new(problems),
                },
            }
        })?;
        Ok(version)
    }

    /// An emission of an event that this program has no Rust type for, once its payload has passed
    /// [`check_json`](Self::check_json). Await that for the event's id, or set options first.
    ///
    /// # Errors
    ///
    /// As of [`check_json`](Self::check_json), or the payload has no form that can be stored.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// let payload = serde_json::json!({ "order": 7, "amount": 12 });
    /// let emission = client.emit_json("order.paid", None, &payload).await?;
    /// let event_id = emission.idempotency_key("order-7").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn emit_json(
        &self,
        event_type: &str,
        version: Option<u32>,
        payload: &Value,
    ) -> Result<Emission<'_>, PayloadError> {
        let version = self.check_json(event_type, version, payload).await?;
        let text = encode(event_type, payload, self.limits().payload_bytes)?;
        let outgoing = inheriting(Outgoing::of_json(event_type.to_owned(), version, text));
        Ok(Emission::new(self, None, Ok(outgoing)))
    }

    /// An emission of an event of a type that no app has to have declared: nothing but its name and size is
    /// checked. A handler that takes another version than this waits for it in vain.
    ///
    /// # Errors
    ///
    /// [`PayloadError`]: no event type is called so, the version is none, or the payload has no form that can be
    /// stored.
    pub fn emit_undeclared(
        &self,
        event_type: &str,
        version: u32,
        payload: &Value,
    ) -> Result<Emission<'_>, PayloadError> {
        check_event_type(event_type)?;
        if version == 0 || i32::try_from(version).is_err() {
            return Err(PayloadError::Version { version });
        }
        let text = encode(event_type, payload, self.limits().payload_bytes)?;
        let outgoing = inheriting(Outgoing::of_json(event_type.to_owned(), version, text));
        Ok(Emission::new(self, None, Ok(outgoing)))
    }

    /// Puts emissions together, so that all of their events are stored in one transaction, or none. Await it for
    /// their ids, in order.
    ///
    /// An emission with a transaction of yours ([`emit_in`](Self::emit_in)) leaves that transaction.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// let paid = client.emit_json("order.paid", None, &serde_json::json!({ "order": 7 })).await?;
    /// let sent = client.emit_json("parcel.sent", None, &serde_json::json!({ "parcel": 3 })).await?;
    /// let ids = client.emit_together([paid.idempotency_key("order-7"), sent]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn emit_together<'a>(
        &'a self,
        emissions: impl IntoIterator<Item = Emission<'a>>,
    ) -> Emissions<'a> {
        let outgoing = emissions.into_iter().map(Emission::into_outgoing).collect();
        Emissions::new(self, outgoing)
    }
}
