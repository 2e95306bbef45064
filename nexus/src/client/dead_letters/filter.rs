use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// Which dead letters of a group are meant: those that fulfil every condition. Without a condition it is
/// all of them.
///
/// Ids can be given instead: `&[17, 18]`, or what borrows as a slice of them.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use nexus::client::DeadLetterFilter;
///
/// // What `charge_fee` gave up in the last two hours.
/// let filter = DeadLetterFilter::new()
///     .handler("charge_fee")
///     .newer_than(Duration::from_hours(2));
/// # drop(filter);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[must_use = "a filter does nothing by itself"]
pub struct DeadLetterFilter {
    conditions: Map<String, Value>,
    ids: Option<Vec<i64>>,
}

/// Ages are cut here: more than the database can count back.
const LONGEST: Duration = Duration::from_hours(24 * 365 * 1_000);

impl DeadLetterFilter {
    /// All dead letters of the group.
    pub fn new() -> Self {
        Self::default()
    }

    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.conditions.insert(name.to_owned(), value.into());
        self
    }

    /// Those with these [ids](super::DeadLetter::id).
    pub fn ids(mut self, ids: impl IntoIterator<Item = i64>) -> Self {
        let mut ids: Vec<i64> = ids.into_iter().collect();
        ids.sort_unstable();
        ids.dedup();
        self.ids = Some(ids);
        self
    }

    /// Those of a handler, by its name in the group.
    pub fn handler(self, handler: impl Into<String>) -> Self {
        self.with("handler", handler.into())
    }

    /// Those of no handler: messages of foreign programs that could not be adopted.
    pub fn without_handler(self) -> Self {
        self.with("withoutHandler", true)
    }

    /// Those of an event type, by its stored name.
    pub fn event_type(self, event_type: impl Into<String>) -> Self {
        self.with("eventType", event_type.into())
    }

    /// Those of one cause: see [`DeadLetter::fingerprint`](super::DeadLetter::fingerprint).
    pub fn fingerprint(self, fingerprint: impl Into<String>) -> Self {
        self.with("fingerprint", fingerprint.into())
    }

    /// Those with this [reason](super::DeadLetter::reason). No index helps to find them, as it does with
    /// every other condition.
    pub fn reason(self, reason: impl Into<String>) -> Self {
        self.with("reason", reason.into())
    }

    /// Those that were given up at least so long ago, by the clock of the database.
    pub fn older_than(self, age: Duration) -> Self {
        self.with("olderThan", interval(age))
    }

    /// Those that were given up less than so long ago, by the clock of the database.
    pub fn newer_than(self, age: Duration) -> Self {
        self.with("newerThan", interval(age))
    }

    /// Those that were given up at this time or later.
    pub fn failed_from(self, time: Timestamp) -> Self {
        self.with("from", time.to_string())
    }

    /// Those that were given up at this time or before.
    pub fn failed_until(self, time: Timestamp) -> Self {
        self.with("until", time.to_string())
    }

    /// How many ids were given.
    pub(super) fn id_count(&self) -> Option<u64> {
        self.ids.as_ref().map(|ids| ids.len() as u64)
    }

    /// As `core.letter_condition` takes it, with ids all at once.
    pub(crate) fn json(&self) -> String {
        let mut filter = self.conditions.clone();
        if let Some(ids) = &self.ids {
            filter.insert("ids".to_owned(), json!(ids));
        }
        Value::Object(filter).to_string()
    }

    /// The same in pieces that hold no more than `most` ids each.
    pub(super) fn pieces(&self, most: usize) -> Vec<String> {
        let Some(ids) = &self.ids else {
            return vec![self.json()];
        };
        ids.chunks(most)
            .map(|ids| {
                let mut filter = self.conditions.clone();
                filter.insert("ids".to_owned(), json!(ids));
                Value::Object(filter).to_string()
            })
            .collect()
    }
}

fn interval(age: Duration) -> String {
    format!("{} microseconds", age.min(LONGEST).as_micros())
}

impl From<&[i64]> for DeadLetterFilter {
    fn from(ids: &[i64]) -> Self {
        Self::new().ids(ids.iter().copied())
    }
}

impl From<&Vec<i64>> for DeadLetterFilter {
    fn from(ids: &Vec<i64>) -> Self {
        ids.as_slice().into()
    }
}

impl<const N: usize> From<&[i64; N]> for DeadLetterFilter {
    fn from(ids: &[i64; N]) -> Self {
        ids.as_slice().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_cut_into_pieces_and_everything_else_stays_with_each() {
        let filter = DeadLetterFilter::from(&[3, 1, 2, 3]).handler("h");
        assert_eq!(filter.id_count(), Some(3));
        assert_eq!(
            filter.pieces(2),
            [
                r#"{"handler":"h","ids":[1,2]}"#,
                r#"{"handler":"h","ids":[3]}"#
            ]
        );
        assert_eq!(DeadLetterFilter::new().pieces(2), ["{}"]);
        assert!(DeadLetterFilter::from(&[]).pieces(2).is_empty());
    }

    #[test]
    fn ages_have_a_unit_and_an_end() {
        let filter = DeadLetterFilter::new().older_than(Duration::from_millis(1));
        assert_eq!(filter.json(), r#"{"olderThan":"1000 microseconds"}"#);
        let filter = DeadLetterFilter::new().newer_than(Duration::MAX);
        assert_eq!(
            filter.json(),
            r#"{"newerThan":"31536000000000000 microseconds"}"#
        );
    }
}
