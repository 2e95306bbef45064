//! The span around each call of a handler: what logs say is under way, and what a trace shows.
//!
//! With the feature `otel` it belongs to the trace of the event's emitter.

use tracing::{Span, field::Empty, info_span};

use super::{
    Route,
    attempt::{End, Message},
};
use crate::handler::Rejected;

/// A span for handling these messages, which nobody has entered yet.
pub(super) fn of(route: &Route, messages: &[Message]) -> Span {
    let (group, handler, event_type) = (&route.group, route.name(), &route.event_type);
    let span = match messages {
        [message] => {
            let meta = &message.delivery.meta;
            info_span!(
                "handle",
                otel.name = Empty,
                otel.kind = Empty,
                group,
                handler,
                event_type,
                event_id = meta.event_id(),
                attempt = meta.attempt(),
            )
        }
        messages => info_span!(
            "handle",
            otel.name = Empty,
            otel.kind = Empty,
            group,
            handler,
            event_type,
            messages = messages.len(),
        ),
    };
    if !span.is_disabled() {
        otel::begin(&span, route, messages);
    }
    span
}

/// Notes how the call ended.
pub(super) fn end(span: &Span, rejected: &[Rejected], end: &End) {
    if !span.is_disabled() {
        otel::end(span, rejected, end);
    }
}

#[cfg(not(feature = "otel"))]
mod otel {
    use super::{End, Message, Rejected, Route, Span};

    pub(super) fn begin(_: &Span, _: &Route, _: &[Message]) {}

    pub(super) fn end(_: &Span, _: &[Rejected], _: &End) {}
}

/// Attributes are named as in OpenTelemetry's conventions for messaging:
/// <https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/>.
#[cfg(feature = "otel")]
mod otel {
    use opentelemetry::{
        Context,
        trace::{SpanContext, Status, TraceContextExt as _},
    };
    use tracing_opentelemetry::OpenTelemetrySpanExt as _;

    use super::{End, Message, Rejected, Route, Span};
    use crate::{
        event::{EnvelopeMeta, span_context},
        handler::Kind,
        runtime::attempt,
    };

    /// OpenTelemetry keeps so many links of a span by default.
    const MOST_LINKS: usize = 128;

    pub(super) fn begin(span: &Span, route: &Route, messages: &[Message]) {
        span.record("otel.name", format!("handle {}", route.name()));
        span.record("otel.kind", "consumer");
        span.set_attribute("messaging.system", "nexus");
        span.set_attribute("messaging.operation.name", "handle");
        span.set_attribute("messaging.operation.type", "process");
        span.set_attribute("messaging.destination.name", route.event_type.clone());
        span.set_attribute("messaging.consumer.group.name", route.group.clone());
        match messages {
            [message] => {
                let meta = &message.delivery.meta;
                span.set_attribute("messaging.message.id", meta.event_id().to_string());
                if let Some(id) = meta.correlation_id() {
                    span.set_attribute("messaging.message.conversation_id", id.to_owned());
                }
                join(span, meta);
            }
            messages => {
                let count = i64::try_from(messages.len()).unwrap_or(i64::MAX);
                span.set_attribute("messaging.batch.message_count", count);
                let emitters = messages
                    .iter()
                    .filter_map(|message| emitter(&message.delivery.meta));
                for emitter in emitters.take(MOST_LINKS) {
                    span.add_link(emitter);
                }
            }
        }
    }

    /// Makes it part of the emitter's trace. What somebody delivers once more, days later perhaps, has a
    /// trace of its own, which refers to that one.
    fn join(span: &Span, meta: &EnvelopeMeta) {
        let Some(emitter) = emitter(meta) else { return };
        if meta.is_replayed() || meta.redrive_count() > 0 {
            span.add_link(emitter);
        } else {
            // Refused where no layer exports the span: then nobody looks at its parent.
            let _ = span.set_parent(Context::new().with_remote_span_context(emitter));
        }
    }

    fn emitter(meta: &EnvelopeMeta) -> Option<SpanContext> {
        let headers = &meta.headers;
        span_context(
            headers.traceparent.as_deref(),
            headers.tracestate.as_deref(),
        )
    }

    pub(super) fn end(span: &Span, rejected: &[Rejected], end: &End) {
        let error = match end {
            End::Failed(error) if matches!(error.kind(), Kind::Snooze(_)) => None,
            End::Failed(error) | End::Conflicted(error) => Some(error.to_string()),
            End::Disturbed(error) => Some(error.to_string()),
            End::CommittedByHand => Some(attempt::COMMITTED_BY_HAND.to_owned()),
            End::Stolen(_) => Some("the lease was lost".to_owned()),
            End::Aborted => Some("the node stopped".to_owned()),
            End::Committed | End::Succeeded(_) => {
                rejected.first().map(|rejected| rejected.error.to_string())
            }
        };
        if let Some(error) = error {
            span.set_status(Status::error(attempt::cut(error)));
        }
    }
}
