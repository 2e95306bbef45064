//! When to try again: pure arithmetic.

use std::time::Duration;

/// How long a message waits after each failed attempt, and how many attempts there are. Default: ten
/// attempts, waiting 1 s, 2 s, 4 s … up to 10 minutes. See [`App::retry`](crate::App::retry).
///
/// # Examples
///
/// ```
/// # use nexus::RetryPolicy;
/// # use std::time::Duration;
/// let policy = RetryPolicy::exponential(Duration::from_secs(1), Duration::from_secs(60), 10);
/// assert_eq!(policy.delay_after(1), Duration::from_secs(1));
/// assert_eq!(policy.delay_after(3), Duration::from_secs(4));
/// assert_eq!(policy.delay_after(40), Duration::from_secs(60)); // the ceiling
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    first: Duration,
    max: Duration,
    max_attempts: u32,
}

impl Default for RetryPolicy {
    /// Ten attempts, waiting 1 s, 2 s, 4 s … up to 10 minutes.
    fn default() -> Self {
        Self::exponential(Duration::from_secs(1), Duration::from_mins(10), 10)
    }
}

impl RetryPolicy {
    /// Waits `first` after the first attempt and twice as long each time, up to `max` (which is `first` if
    /// it is less). `max_attempts` counts the first attempt and is at least 1.
    #[must_use]
    pub fn exponential(first: Duration, max: Duration, max_attempts: u32) -> Self {
        Self {
            first,
            max: max.max(first),
            max_attempts: max_attempts.max(1),
        }
    }

    /// Waits the same time after each attempt.
    #[must_use]
    pub fn fixed(delay: Duration, max_attempts: u32) -> Self {
        Self::exponential(delay, delay, max_attempts)
    }

    /// How many attempts are made before a message is dead-lettered.
    #[must_use]
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// How long a message waits once attempt number `attempt` has failed, without the jitter of ±20 %.
    /// Attempts count from 1.
    #[must_use]
    pub fn delay_after(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(63);
        self.first
            .saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX))
            .min(self.max)
    }

    /// The same with a jitter of ±20 %, so that messages that failed together do not come back
    /// together. `random` is in `0.0..1.0`.
    #[must_use]
    pub(crate) fn jittered_delay_after(&self, attempt: u32, random: f64) -> Duration {
        self.delay_after(attempt).mul_f64(0.8 + 0.4 * random)
    }

    pub(crate) fn with_backoff(self, first: Duration, max: Duration) -> Self {
        Self::exponential(first, max, self.max_attempts)
    }

    pub(crate) fn with_max_attempts(self, max_attempts: u32) -> Self {
        Self {
            max_attempts: max_attempts.max(1),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_ceiling_and_never_overflows() {
        let policy = RetryPolicy::default();
        let delays: Vec<u64> = (1..=12).map(|n| policy.delay_after(n).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        assert_eq!(policy.delay_after(u32::MAX), Duration::from_mins(10));
    }

    #[test]
    fn jitter_stays_within_a_fifth() {
        let policy = RetryPolicy::fixed(Duration::from_secs(10), 3);
        assert_eq!(policy.jittered_delay_after(1, 0.0), Duration::from_secs(8));
        assert_eq!(policy.jittered_delay_after(2, 0.5), Duration::from_secs(10));
        assert!(policy.jittered_delay_after(9, 0.999) < Duration::from_secs(12));
    }
}
