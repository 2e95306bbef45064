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
        // After 95 doublings a nanosecond is longer than any duration.
        let doublings = attempt.saturating_sub(1).min(95);
        (0..doublings)
            .try_fold(self.first, |delay, _| {
                let doubled = delay.checked_mul(2).filter(|doubled| *doubled < self.max);
                doubled.ok_or(self.max)
            })
            .unwrap_or_else(|ceiling| ceiling)
            .min(self.max)
    }

    /// The same with a jitter of ±20 %, so that messages that failed together do not come back
    /// together. `random` is in `0.0..1.0`.
    #[must_use]
    pub(crate) fn jittered_delay_after(&self, attempt: u32, random: f64) -> Duration {
        let delay = self.delay_after(attempt);
        // The largest durations cannot be made longer.
        Duration::try_from_secs_f64(delay.as_secs_f64() * (0.8 + 0.4 * random)).unwrap_or(delay)
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubles_up_to_the_ceiling_and_never_overflows() {
        let policy = RetryPolicy::default();
        let delays: Vec<u64> = (1..=12).map(|n| policy.delay_after(n).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        assert_eq!(policy.delay_after(u32::MAX), Duration::from_mins(10));
    }

    /// Any policy, also of the shortest and longest durations.
    fn policies() -> impl Strategy<Value = RetryPolicy> {
        let durations = || {
            prop_oneof![
                any::<Duration>(),
                (0_u64..1 << 40).prop_map(Duration::from_millis),
                Just(Duration::ZERO),
                Just(Duration::from_nanos(1)),
                Just(Duration::MAX),
            ]
        };
        (durations(), durations(), any::<u32>())
            .prop_map(|(first, max, attempts)| RetryPolicy::exponential(first, max, attempts))
    }

    proptest! {
        #[test]
        fn any_policy_doubles_to_its_ceiling(policy in policies(), attempt in prop_oneof![1..100_u32, any::<u32>()]) {
            let delay = policy.delay_after(attempt);
            let next = policy.delay_after(attempt.saturating_add(1));
            prop_assert!(policy.first <= delay && delay <= next && next <= policy.max);
            prop_assert!(next == policy.max || next == delay * 2 || attempt == 0 || attempt == u32::MAX);
            if !policy.first.is_zero() {
                prop_assert_eq!(policy.delay_after(u32::MAX), policy.max);
            }
        }

        #[test]
        fn jitter_stays_within_a_fifth_of_any_delay(
            policy in policies(), attempt in any::<u32>(), random in 0.0..1.0_f64
        ) {
            let delay = policy.delay_after(attempt).as_secs_f64();
            let jittered = policy.jittered_delay_after(attempt, random).as_secs_f64();
            // A nanosecond cannot be divided.
            let rounded = 1e-9 + delay * 1e-9;
            prop_assert!((jittered - delay).abs() <= delay * 0.2 + rounded, "{jittered} of {delay}");
        }
    }

    #[test]
    fn jitter_stays_within_a_fifth() {
        let policy = RetryPolicy::fixed(Duration::from_secs(10), 3);
        assert_eq!(policy.jittered_delay_after(1, 0.0), Duration::from_secs(8));
        assert_eq!(policy.jittered_delay_after(2, 0.5), Duration::from_secs(10));
        assert!(policy.jittered_delay_after(9, 0.999) < Duration::from_secs(12));
    }
}
