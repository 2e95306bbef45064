//! Times and durations, as they are written on the command line and told to people.

use std::{str::FromStr, time::Duration};

use nexus::jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};

/// A moment: a time, or so long ago.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Moment {
    Ago(Duration),
    At(Timestamp),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(at) = text.parse() {
            return Ok(Self::At(at));
        }
        match duration(text) {
            Ok(ago) => Ok(Self::Ago(ago)),
            Err(_) => Err(
                "expected how long ago, such as 90s, 30m, 2h or 7d, or a time such as 2030-01-31T12:00:00Z"
                    .to_owned(),
            ),
        }
    }
}

impl Moment {
    /// By the clock of the database, whose time is `now`.
    pub(crate) fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::Ago(ago) => SignedDuration::try_from(ago)
                .ok()
                .and_then(|ago| now.checked_sub(ago).ok())
                .unwrap_or(Timestamp::UNIX_EPOCH),
        }
    }
}

/// Reads `90s`, `30m`, `2h` or `7d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a duration such as 90s, 30m, 2h or 7d".to_owned();
    let span: Span = text.parse().map_err(|_| wrong())?;
    let duration = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| wrong())?;
    duration.try_into().map_err(|_| wrong())
}

/// `17 s`, `3 m`, `5 h`, `12 d`: what matters at a glance.
pub(crate) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..120 => format!("{seconds} s"),
        120..7_200 => format!("{} m", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// `3 m ago`, or `in 3 m`.
pub(crate) fn relative(now: Timestamp, at: Timestamp) -> String {
    let ago = now.duration_since(at);
    let distance = ago.unsigned_abs();
    if distance < Duration::from_secs(1) {
        "now".to_owned()
    } else if ago.is_positive() {
        format!("{} ago", short(distance))
    } else {
        format!("in {}", short(distance))
    }
}

/// `2030-01-31 12:00:00`, in UTC.
pub(crate) fn full(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_told() {
        for (text, seconds, told) in [
            ("90s", 90, "90 s"),
            ("30m", 1_800, "30 m"),
            ("2h", 7_200, "2 h"),
            ("2h 30m", 9_000, "2 h"),
            ("7d", 604_800, "7 d"),
        ] {
            let read = duration(text).unwrap();
            assert_eq!(read, Duration::from_secs(seconds), "{text}");
            assert_eq!(short(read), told);
        }
        for text in ["", "7", "-2h", "soon", "1mo"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(short(Duration::from_millis(120)), "120 ms");
    }

    #[test]
    fn moments_are_times_or_so_long_ago() {
        let now: Timestamp = "2030-01-31T12:00:00Z".parse().unwrap();
        let before = |text: &str| text.parse::<Moment>().unwrap().before(now);
        assert_eq!(before("2h").to_string(), "2030-01-31T10:00:00Z");
        assert_eq!(
            before("2030-01-01T00:00:00Z").to_string(),
            "2030-01-01T00:00:00Z"
        );
        assert!("yesterday".parse::<Moment>().is_err());
        assert_eq!(relative(now, before("3m")), "3 m ago");
        assert_eq!(relative(before("3m"), now), "in 3 m");
        assert_eq!(relative(now, now), "now");
    }
}
