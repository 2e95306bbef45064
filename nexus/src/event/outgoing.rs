use std::time::Duration;

use jiff::Timestamp;

use super::{
    EncodeError, Event, encode,
    encode::check_size,
    trace::{self, is_traceparent},
};

/// Longest idempotency key in bytes: it stands in an index, whose rows are limited.
const LONGEST_KEY: usize = 1_000;

/// Longest delay: ten years. More is a mistake, such as milliseconds taken for seconds.
const LONGEST_DELAY: Duration = Duration::from_hours(24 * 3_653);

/// When an event is due, by the clock of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delay {
    /// So long after the time of the transaction.
    After(Duration),
    At(Timestamp),
}

impl Delay {
    /// How far ahead it is, as far as this process can tell: its clock may be off.
    fn ahead(self) -> Duration {
        match self {
            Self::After(delay) => delay,
            Self::At(time) => time
                .duration_since(Timestamp::now())
                .try_into()
                .unwrap_or(Duration::ZERO),
        }
    }
}

/// An event in the form in which it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
    pub(crate) payload: String,
    pub(crate) key: Option<String>,
    pub(crate) idempotency_key: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
    pub(crate) delay: Option<Delay>,
}

impl Outgoing {
    pub(crate) fn new<E: Event>(event: &E, limit: usize) -> Result<Self, EncodeError> {
        let outgoing = Self {
            event_type: E::EVENT_TYPE.to_owned(),
            event_version: E::VERSION,
            payload: encode(E::EVENT_TYPE, event, limit)?,
            key: event.event_key(),
            idempotency_key: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            delay: None,
        };
        outgoing.check(limit)?;
        Ok(outgoing)
    }

    /// An event of a type that the program has no Rust type for.
    pub(crate) fn of_json(event_type: String, event_version: u32, payload: String) -> Self {
        Self {
            event_type,
            event_version,
            payload,
            key: None,
            idempotency_key: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            delay: None,
        }
    }

    /// Refuses what the server would refuse, which would abort the transaction it is sent with.
    pub(crate) fn check(&self, limit: usize) -> Result<(), EncodeError> {
        let event_type = || self.event_type.clone();
        check_size(&self.event_type, &self.payload, limit)?;
        let texts = [
            &self.key,
            &self.idempotency_key,
            &self.correlation_id,
            &self.traceparent,
            &self.tracestate,
        ];
        if texts.into_iter().flatten().any(|text| text.contains('\0')) {
            return Err(EncodeError::NulCharacter {
                event_type: event_type(),
            });
        }
        if let Some(found) = &self.traceparent
            && !is_traceparent(found)
        {
            return Err(EncodeError::NoTraceparent {
                event_type: event_type(),
                found: found.clone(),
            });
        }
        match &self.idempotency_key {
            Some(key) if key.is_empty() => Err(EncodeError::KeyEmpty {
                event_type: event_type(),
            }),
            Some(key) if key.len() > LONGEST_KEY => Err(EncodeError::KeyTooLong {
                event_type: event_type(),
                bytes: key.len(),
                limit: LONGEST_KEY,
            }),
            _ => Ok(()),
        }?;
        match self.delay.map(Delay::ahead) {
            Some(delay) if delay > LONGEST_DELAY => Err(EncodeError::DelayTooLong {
                event_type: event_type(),
                delay,
                limit: LONGEST_DELAY,
            }),
            _ => Ok(()),
        }
    }

    /// Emits the event later; at once if there is nothing to wait for.
    pub(crate) fn delay_by(&mut self, delay: Duration) {
        self.delay = (!delay.is_zero()).then_some(Delay::After(delay));
    }

    /// Whether it may be due before `pause` has passed.
    pub(crate) fn is_delayed_less_than(&self, pause: Duration) -> bool {
        self.delay.is_some_and(|delay| delay.ahead() < pause)
    }

    /// Puts the event into this trace instead of that of what is under way.
    pub(crate) fn join(&mut self, traceparent: String) {
        (self.traceparent, self.tracestate) = (Some(traceparent), None);
    }

    /// Fills in what was not given from what is under way: a span, and the event that is being handled.
    pub(crate) fn inherit(&mut self, cause: Option<&Cause>) {
        if self.traceparent.is_none()
            && let Some((traceparent, tracestate)) = trace::current()
        {
            (self.traceparent, self.tracestate) = (Some(traceparent), tracestate);
        }
        let Some(cause) = cause else { return };
        if self.correlation_id.is_none() {
            self.correlation_id.clone_from(&cause.correlation_id);
        }
        if self.causation_id.is_none() {
            self.causation_id = Some(cause.event_id.to_string());
        }
        if self.traceparent.is_none() {
            self.traceparent.clone_from(&cause.traceparent);
            self.tracestate.clone_from(&cause.tracestate);
        }
    }
}

/// The event whose handler is running, as far as what it emits inherits from it.
#[derive(Debug, Clone)]
pub(crate) struct Cause {
    pub(crate) event_id: i64,
    pub(crate) correlation_id: Option<String>,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
}
