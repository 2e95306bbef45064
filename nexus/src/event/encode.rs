//! From an event to the text that is stored.
//!
//! A payload is serialized once, straight to text. Three things that Postgres would refuse, or
//! that JSON would silently change, are refused here instead, because inside a user's transaction
//! a refusal by the server would abort everything: U+0000, numbers that are not finite, and
//! payloads over the size limit.

use serde::{Serialize, ser};

/// Why an event has no form that can be stored. Nothing was sent; sending it again cannot succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The type's `Serialize` failed; `source` says where.
    #[error("event `{event_type}` could not be serialized")]
    Serialize {
        /// The event type.
        event_type: String,
        /// What `serde_json` reported.
        source: serde_json::Error,
    },
    /// A number is NaN or infinite; JSON has no such numbers. Store an `Option` or a string instead.
    #[error("event `{event_type}` holds a number that is not finite, which JSON cannot store")]
    NotFinite {
        /// The event type.
        event_type: String,
    },
    /// A text holds U+0000, which Postgres cannot store. Remove it or encode the bytes.
    #[error("event `{event_type}` holds the character U+0000, which Postgres cannot store")]
    NulCharacter {
        /// The event type.
        event_type: String,
    },
    /// The payload is over the limit. Store it elsewhere and emit a reference, or raise
    /// `App::max_payload_bytes`.
    #[error("the payload of event `{event_type}` has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// The event type.
        event_type: String,
        /// Size in bytes of the payload's text as Postgres writes it; see `App::max_payload_bytes`.
        bytes: usize,
        /// The limit in force, in bytes.
        limit: usize,
    },
    /// The idempotency key is too long to be kept. Use a hash of it.
    #[error("the idempotency key of event `{event_type}` has {bytes} bytes, the limit is {limit}")]
    KeyTooLong {
        /// The event type.
        event_type: String,
        /// Size of the key in bytes.
        bytes: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The idempotency key is the empty text, which every event without a key of its own would share. Leave
    /// it out instead.
    #[error(
        "the idempotency key of event `{event_type}` is empty: leave it out for an event that needs none"
    )]
    KeyEmpty {
        /// The event type.
        event_type: String,
    },
    /// The trace context has not the form that the W3C gave it, so that nobody could follow it. Pass on the
    /// `traceparent` header of the request, or leave it out.
    #[error(
        "the traceparent of event `{event_type}` is `{found}`, which is refused: it has the form 00-<trace id, 32 digits>-<parent id, 16 digits>-<flags, 2 digits>, with digits 0-9 and a-f and no id all zeros"
    )]
    NoTraceparent {
        /// The event type.
        event_type: String,
        /// What was given.
        found: String,
    },
    /// The event is to be emitted too long from now. Store the wish as a row of your own.
    #[error("event `{event_type}` is delayed by {delay:?}, the limit is {limit:?}: ten years")]
    DelayTooLong {
        /// The event type.
        event_type: String,
        /// How far ahead it is due.
        delay: std::time::Duration,
        /// The limit.
        limit: std::time::Duration,
    },
}

/// Serializes a payload and checks that it can be stored.
pub(crate) fn encode<T: Serialize + ?Sized>(
    event_type: &str,
    payload: &T,
    limit: usize,
) -> Result<String, EncodeError> {
    if payload
        .serialize(OnlyFinite)
        .is_err_and(|found| found.not_finite)
    {
        return Err(EncodeError::NotFinite {
            event_type: event_type.to_owned(),
        });
    }
    let text = serde_json::to_string(payload).map_err(|source| EncodeError::Serialize {
        event_type: event_type.to_owned(),
        source,
    })?;
    check_text(event_type, &text, limit)?;
    Ok(text)
}

/// Checks JSON text for what Postgres refuses.
fn check_text(event_type: &str, text: &str, limit: usize) -> Result<(), EncodeError> {
    check_size(event_type, text, limit)?;
    if has_escaped_nul(text) {
        return Err(EncodeError::NulCharacter {
            event_type: event_type.to_owned(),
        });
    }
    Ok(())
}

/// Checks the size of compact JSON text against the limit on payloads.
pub(super) fn check_size(event_type: &str, text: &str, limit: usize) -> Result<(), EncodeError> {
    // What is stored is longer by less than its own length, unless a number has an exponent.
    if text.len() < limit / 2 && !may_have_exponent(text) {
        return Ok(());
    }
    let bytes = stored_len(text);
    if bytes > limit {
        return Err(EncodeError::TooLarge {
            event_type: event_type.to_owned(),
            bytes,
            limit,
        });
    }
    Ok(())
}

/// False if no number of the text has an exponent.
fn may_have_exponent(text: &str) -> bool {
    text.as_bytes()
        .windows(2)
        .any(|pair| pair[0].is_ascii_digit() && matches!(pair[1], b'e' | b'E'))
}

/// How many bytes compact JSON text has once it has become `jsonb` and text again: that is what a
/// claim measures. A blank follows each comma and colon, and numbers are written out.
fn stored_len(text: &str) -> usize {
    let mut rest = text;
    let mut stored = 0;
    while let Some(first) = rest.bytes().next() {
        let token = match first {
            b'"' => string_len(rest),
            b'-' | b'0'..=b'9' => rest
                .find(|c: char| !matches!(c, '0'..='9' | '.' | 'e' | 'E' | '+' | '-'))
                .unwrap_or(rest.len()),
            // Punctuation, and the letters of words: all that is outside of strings is ASCII.
            _ => 1,
        };
        stored += match first {
            b',' | b':' => 2,
            b'-' | b'0'..=b'9' => written_out_len(&rest[..token]),
            _ => token,
        };
        rest = &rest[token..];
    }
    stored
}

/// The length of the string that the text starts with, with both quotes.
fn string_len(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    });
    end.map_or(text.len(), |before| before + 2)
}

/// The length of a number without its exponent: Postgres writes 1e300 with 301 digits.
fn written_out_len(number: &str) -> usize {
    let Some((mantissa, exponent)) = number.split_once(['e', 'E']) else {
        return number.len();
    };
    // One that is no i64 is no number for Postgres either.
    let exponent: i64 = exponent.parse().unwrap_or(0);
    let shift = usize::try_from(exponent.unsigned_abs()).unwrap_or(usize::MAX);
    let digits = mantissa.trim_start_matches('-');
    let sign = mantissa.len() - digits.len();
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let (whole, fraction) = if exponent >= 0 {
        (
            whole.len().saturating_add(shift),
            fraction.len().saturating_sub(shift),
        )
    } else {
        (
            whole.len().saturating_sub(shift).max(1),
            fraction.len().saturating_add(shift),
        )
    };
    let point = usize::from(fraction > 0);
    sign.saturating_add(whole)
        .saturating_add(point)
        .saturating_add(fraction)
}

/// Whether JSON text holds the escape of U+0000. A backslash that is itself escaped does not count.
fn has_escaped_nul(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.match_indices("\\u0000").any(|(at, _)| {
        let slashes = bytes[..at]
            .iter()
            .rev()
            .take_while(|&&b| b == b'\\')
            .count();
        slashes % 2 == 0
    })
}

/// A serializer that writes nothing and fails at the first number that is not finite.
///
/// `serde_json` writes `null` for such a number and cannot be told to refuse it.
#[derive(Clone, Copy)]
struct OnlyFinite;

#[derive(Debug)]
struct Stop {
    not_finite: bool,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stop {}

impl ser::Error for Stop {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        // The type's own failure: the real serializer meets it again and reports it with its text.
        Self { not_finite: false }
    }
}

fn finite(is_finite: bool) -> Result<(), Stop> {
    if is_finite {
        Ok(())
    } else {
        Err(Stop { not_finite: true })
    }
}

macro_rules! accept {
    ($($method:ident: $type:ty),* $(,)?) => {
        $(fn $method(self, _: $type) -> Result<(), Stop> { Ok(()) })*
    };
}

impl ser::Serializer for OnlyFinite {
    type Ok = ();
    type Error = Stop;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    accept! {
        serialize_bool: bool, serialize_char: char, serialize_str: &str, serialize_bytes: &[u8],
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_i128: i128, serialize_u8: u8, serialize_u16: u16, serialize_u32: u32,
        serialize_u64: u64, serialize_u128: u128, serialize_unit_struct: &'static str,
    }

    fn serialize_f32(self, v: f32) -> Result<(), Stop> {
        finite(v.is_finite())
    }
    fn serialize_f64(self, v: f64) -> Result<(), Stop> {
        finite(v.is_finite())
    }
    fn serialize_none(self) -> Result<(), Stop> {
        Ok(())
    }
    fn serialize_unit(self) -> Result<(), Stop> {
        Ok(())
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Stop> {
        value.serialize(self)
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), Stop> {
        Ok(())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Stop> {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), Stop> {
        value.serialize(self)
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_tuple(self, _: usize) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, Stop> {
        Ok(self)
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, Stop> {
        Ok(self)
    }
    fn collect_str<T: std::fmt::Display + ?Sized>(self, _: &T) -> Result<(), Stop> {
        Ok(())
    }
}

macro_rules! visit_members {
    ($($trait:ident :: $method:ident ($($name:ident)?)),* $(,)?) => {
        $(impl ser::$trait for OnlyFinite {
            type Ok = ();
            type Error = Stop;
            fn $method<T: Serialize + ?Sized>(
                &mut self,
                $($name: &'static str,)?
                value: &T,
            ) -> Result<(), Stop> {
                $(let _ = $name;)?
                value.serialize(*self)
            }
            fn end(self) -> Result<(), Stop> { Ok(()) }
        })*
    };
}

visit_members! {
    SerializeSeq::serialize_element(),
    SerializeTuple::serialize_element(),
    SerializeTupleStruct::serialize_field(),
    SerializeTupleVariant::serialize_field(),
    SerializeStruct::serialize_field(_key),
    SerializeStructVariant::serialize_field(_key),
}

impl ser::SerializeMap for OnlyFinite {
    type Ok = ();
    type Error = Stop;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, _: &T) -> Result<(), Stop> {
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Stop> {
        value.serialize(*self)
    }
    fn end(self) -> Result<(), Stop> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Reading {
        values: Vec<Option<f64>>,
        note: &'static str,
    }

    fn try_encode(values: Vec<Option<f64>>, note: &'static str) -> Result<String, EncodeError> {
        encode("reading.taken", &Reading { values, note }, 100)
    }

    #[test]
    fn writes_plain_json() {
        let text = try_encode(vec![Some(1.5), None], "ok").unwrap();
        assert_eq!(text, r#"{"values":[1.5,null],"note":"ok"}"#);
    }

    #[test]
    fn refuses_numbers_that_are_not_finite() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = try_encode(vec![Some(1.0), Some(bad)], "").unwrap_err();
            assert!(matches!(error, EncodeError::NotFinite { .. }), "{error}");
        }
    }

    #[test]
    fn refuses_the_nul_character_but_not_its_written_escape() {
        assert!(matches!(
            try_encode(vec![], "a\0b").unwrap_err(),
            EncodeError::NulCharacter { .. }
        ));
        try_encode(vec![], "a\\u0000b").unwrap();
        assert!(matches!(
            try_encode(vec![], "a\\\0b").unwrap_err(),
            EncodeError::NulCharacter { .. }
        ));
    }

    #[test]
    fn refuses_what_is_over_the_limit() {
        let error = encode("note.taken", &"x".repeat(99), 100).unwrap_err();
        assert!(
            matches!(
                error,
                EncodeError::TooLarge {
                    bytes: 101,
                    limit: 100,
                    ..
                }
            ),
            "{error}"
        );
        encode("note.taken", &"x".repeat(98), 100).unwrap();
    }

    #[test]
    fn measures_what_postgres_writes() {
        for (text, stored) in [
            ("{}", "{}"),
            ("[1,-2.50,true,null]", "[1, -2.50, true, null]"),
            (r#"{"a":[],"b":{"c":0}}"#, r#"{"a": [], "b": {"c": 0}}"#),
            (
                r#"["a,b:c","\",","\\",1,"ä:1e9"]"#,
                r#"["a,b:c", "\",", "\\", 1, "ä:1e9"]"#,
            ),
            ("1e16", "10000000000000000"),
            ("-1.5e3", "-1500"),
            ("1.25e1", "12.5"),
            ("1E+2", "100"),
            ("1.5e-10", "0.00000000015"),
            ("12e-1", "1.2"),
        ] {
            assert_eq!(stored_len(text), stored.len(), "{text}");
        }
        assert_eq!(stored_len("1e300"), 301);
        assert_eq!(stored_len("[5e-324,1e300]"), 2 + 326 + 2 + 301);
    }

    #[test]
    fn limits_what_is_stored_and_not_what_is_sent() {
        // 67 and 69 bytes as sent; as stored, each comma has a blank after it.
        encode("numbers.drawn", &vec![1_u8; 33], 100).unwrap();
        let error = encode("numbers.drawn", &vec![1_u8; 34], 100).unwrap_err();
        assert!(
            matches!(error, EncodeError::TooLarge { bytes: 102, .. }),
            "{error}"
        );
        let error = encode("numbers.drawn", &1e300, 100).unwrap_err();
        assert!(
            matches!(error, EncodeError::TooLarge { bytes: 301, .. }),
            "{error}"
        );
    }
}
