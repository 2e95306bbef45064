//! What was meant.

use std::fmt::Display;

/// The known word that looks most like `given`, if one does.
#[must_use]
pub fn closest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let given = given.to_lowercase();
    let tolerated = (given.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|word| {
            (
                strsim::damerau_levenshtein(&given, &word.to_lowercase()),
                word,
            )
        })
        .filter(|&(distance, _)| distance <= tolerated)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, word)| word)
}

/// `; did you mean …?`, or nothing.
#[must_use]
pub fn did_you_mean(word: Option<impl Display>) -> String {
    word.map(|word| format!("; did you mean `{word}`?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] = ["group", "name", "max_attempts", "timeout"];

    #[test]
    fn finds_the_word_that_was_meant() {
        for (given, meant) in [
            ("max_atempts", "max_attempts"),
            ("gruop", "group"),
            ("Name", "name"),
            ("timout", "timeout"),
        ] {
            assert_eq!(closest(given, KNOWN), Some(meant));
        }
    }

    #[test]
    fn guesses_nothing_from_another_word() {
        for given in ["queue", "x", ""] {
            assert_eq!(closest(given, KNOWN), None);
        }
    }
}
