use super::{EncodeError, Event, encode};

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
}

impl Outgoing {
    pub(crate) fn new<E: Event>(event: &E, limit: usize) -> Result<Self, EncodeError> {
        let key = event.event_key();
        if key.as_ref().is_some_and(|key| key.contains('\0')) {
            return Err(EncodeError::NulCharacter {
                event_type: E::EVENT_TYPE.to_owned(),
            });
        }
        Ok(Self {
            event_type: E::EVENT_TYPE.to_owned(),
            event_version: E::VERSION,
            payload: encode(E::EVENT_TYPE, event, limit)?,
            key,
            idempotency_key: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
        })
    }

    /// Fills in what was not given from the event that is being handled.
    pub(crate) fn inherit(&mut self, cause: &Cause) {
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
