//! What the emitters said, kept in the memory of the suite: the database may lose nothing of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// What is known of an emit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fact {
    /// It was sent and no answer came: it may be stored or not.
    Unknown,
    /// It is stored, with this id (0 if the emit tells none).
    Acknowledged(i64),
    /// Nothing was stored.
    Refused,
}

/// The emits of a fault, by number.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    facts: Arc<Mutex<BTreeMap<i64, Fact>>>,
}

impl Ledger {
    /// Notes a line of an emitter; false if it is none.
    pub(crate) fn read(&self, line: &str) -> bool {
        let words: Vec<&str> = line.split(' ').collect();
        let entry = match words[..] {
            ["sent", number] => number.parse().map(|number| (number, Fact::Unknown)),
            ["refused", number] => number.parse().map(|number| (number, Fact::Refused)),
            ["acknowledged", number, id] => number
                .parse()
                .and_then(|number| Ok((number, Fact::Acknowledged(id.parse()?)))),
            _ => return false,
        };
        let Ok((number, fact)) = entry else {
            return false;
        };
        self.lock().insert(number, fact);
        true
    }

    pub(crate) fn facts(&self) -> BTreeMap<i64, Fact> {
        self.lock().clone()
    }

    /// How many were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> usize {
        let is_acknowledged = |fact: &&Fact| matches!(fact, Fact::Acknowledged(_));
        self.lock().values().filter(is_acknowledged).count()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<i64, Fact>> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_number_counts() {
        let ledger = Ledger::default();
        for line in [
            "sent 1",
            "sent 2",
            "acknowledged 1 77",
            "sent 3",
            "refused 3",
        ] {
            assert!(ledger.read(line));
        }
        assert!(!ledger.read("acknowledged 2"));
        assert!(!ledger.read("sent two"));
        let facts: Vec<_> = ledger.facts().into_iter().collect();
        assert_eq!(
            facts,
            [
                (1, Fact::Acknowledged(77)),
                (2, Fact::Unknown),
                (3, Fact::Refused)
            ]
        );
        assert_eq!(ledger.acknowledged(), 1);
    }
}
