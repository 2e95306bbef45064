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
        /// Size of the payload in bytes.
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

/// Checks JSON text that was made elsewhere for what Postgres refuses.
pub(crate) fn check_text(event_type: &str, text: &str, limit: usize) -> Result<(), EncodeError> {
    if text.len() > limit {
        return Err(EncodeError::TooLarge {
            event_type: event_type.to_owned(),
            bytes: text.len(),
            limit,
        });
    }
    if has_escaped_nul(text) {
        return Err(EncodeError::NulCharacter {
            event_type: event_type.to_owned(),
        });
    }
    Ok(())
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
}
