//! The W3C trace context, as far as it has a form.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

#[cfg(feature = "otel")]
pub(crate) use otel::{current, span_context};

/// A longer `tracestate` is not passed on: it would be stored with each message. The W3C asks for 512
/// characters at least.
pub(crate) const LONGEST_TRACESTATE: usize = 512;

/// Without OpenTelemetry no span has an identity that another process could know.
#[cfg(not(feature = "otel"))]
pub(crate) fn current() -> Option<(String, Option<String>)> {
    None
}

/// Whether a text is a `traceparent` of the W3C's trace context:
/// `00-<trace id, 32 digits>-<parent id, 16 digits>-<flags, 2 digits>`, with digits `0-9` and `a-f`, and
/// neither id all zeros. A later version than 00 may have more behind it.
#[must_use]
pub fn is_traceparent(text: &str) -> bool {
    let is_hex = |part: &str, length: usize| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        part.len() == length && part.bytes().all(is_digit)
    };
    let is_id = |part: &str, length| is_hex(part, length) && part.bytes().any(|byte| byte != b'0');
    let mut parts = text.splitn(5, '-');
    let mut next = || parts.next().unwrap_or_default();
    let (version, trace, parent, flags) = (next(), next(), next(), next());
    let has_more = parts.next().is_some();
    is_hex(version, 2)
        && version != "ff"
        && is_id(trace, 32)
        && is_id(parent, 16)
        && is_hex(flags, 2)
        && (version != "00" || !has_more)
}

/// Reads a `traceparent` that anybody may have written: what is none is left out, so that it costs the trace
/// and not the message, and is not passed on.
pub(crate) fn lenient<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let text = lenient_text(deserializer)?;
    Ok(text.filter(|text| is_traceparent(text)))
}

/// Reads a text, and anything else as none.
pub(crate) fn lenient_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => Some(text),
        _ => None,
    })
}

#[cfg(feature = "otel")]
mod otel {
    use opentelemetry::{
        Context,
        trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState},
    };
    use tracing_opentelemetry::OpenTelemetrySpanExt as _;

    use super::{LONGEST_TRACESTATE, is_traceparent};

    /// `traceparent` and `tracestate` of the span that is under way, if there is one that OpenTelemetry knows.
    pub(crate) fn current() -> Option<(String, Option<String>)> {
        let context = Context::current();
        let known = context.span().span_context().clone();
        let span = if known.is_valid() {
            known
        } else {
            // A layer that does not make its spans current for OpenTelemetry.
            let context = tracing::Span::current().context();
            context.span().span_context().clone()
        };
        span.is_valid().then(|| {
            let (trace, id, flags) = (span.trace_id(), span.span_id(), span.trace_flags());
            let state = span.trace_state().header();
            (
                format!("00-{trace}-{id}-{flags:02x}"),
                (!state.is_empty() && state.len() <= LONGEST_TRACESTATE).then_some(state),
            )
        })
    }

    /// What [`current`] has written, in another process or by somebody else.
    pub(crate) fn span_context(
        traceparent: Option<&str>,
        tracestate: Option<&str>,
    ) -> Option<SpanContext> {
        let mut parts = traceparent.filter(|text| is_traceparent(text))?.split('-');
        let (_version, trace, id, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        // A state that cannot be read does not cost the trace.
        let state = tracestate.and_then(|text| text.parse::<TraceState>().ok());
        Some(SpanContext::new(
            TraceId::from_hex(trace).ok()?,
            SpanId::from_hex(id).ok()?,
            // Of the flags of later versions nobody knows what they mean.
            TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED,
            true,
            state.unwrap_or_default(),
        ))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

        #[test]
        fn what_is_written_is_what_is_read() {
            let read = span_context(Some(PARENT), Some("rojo=00f067aa0ba902b7,congo=t61")).unwrap();
            assert!(read.is_remote() && read.is_sampled());
            let _current = Context::new().with_remote_span_context(read).attach();
            let state = Some("rojo=00f067aa0ba902b7,congo=t61".to_owned());
            assert_eq!(current(), Some((PARENT.to_owned(), state)));
        }

        #[test]
        fn a_state_that_is_none_does_not_cost_the_trace() {
            for state in ["", "no state", "=", "a=b=c\u{e4}"] {
                let read = span_context(Some(PARENT), Some(state)).unwrap();
                assert_eq!(read.span_id().to_string(), "00f067aa0ba902b7", "{state}");
            }
            assert!(span_context(Some("00-4bf9-00f0-01"), None).is_none());
            assert!(span_context(None, Some("a=b")).is_none());
        }

        #[test]
        fn without_a_span_there_is_no_context() {
            assert_eq!(current(), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    #[test]
    fn knows_the_form_of_the_w3c() {
        for accepted in [
            format!("00-{TRACE}-{PARENT}-01"),
            format!("00-{TRACE}-{PARENT}-ff"),
            format!("cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"),
        ] {
            assert!(is_traceparent(&accepted), "{accepted}");
        }
        let zeros = "0".repeat(32);
        for refused in [
            String::new(),
            "xyz".to_owned(),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-01-more"),
            format!("00-{TRACE}-{PARENT}-1"),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("00-{}-{PARENT}-01", TRACE.to_uppercase()),
            format!("00-{zeros}-{PARENT}-01"),
            format!("00-{TRACE}-{}-01", &zeros[..16]),
            format!("00-{TRACE}-{PARENT}-01 "),
            format!("00-{TRACE}ä-{PARENT}-01"),
        ] {
            assert!(!is_traceparent(&refused), "{refused}");
        }
    }
}
