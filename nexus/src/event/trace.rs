//! The W3C trace context, as far as it has a form.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

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
