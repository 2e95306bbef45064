//! Fault helpers of the nexus test suites. Databases and clocks come from `nexus::testing`.

use std::{future::Future, panic::UnwindSafe, time::Duration};

use futures_util::FutureExt as _;

/// How long anything may take before a test gives up: generous, because machines are shared.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Waits for something that must happen.
///
/// # Panics
///
/// If it takes longer than [`PATIENCE`]; `what` says what did not happen.
#[track_caller]
pub fn within<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let Ok(output) = tokio::time::timeout(PATIENCE, future).await else {
            panic!("{caller}: within {PATIENCE:?} this did not happen: {what}");
        };
        output
    }
}

/// Asks again and again until the answer is `Some`, for states of the database that no signal
/// announces.
///
/// # Panics
///
/// If it takes longer than [`PATIENCE`].
#[track_caller]
pub fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> impl Future<Output = T> {
    within(what, async move {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
}

/// The text that `future` panics with; `None` if it does not.
pub async fn catch_panic<F: Future + UnwindSafe>(future: F) -> Option<String> {
    let panic = future.catch_unwind().await.err()?;
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    Some(text.unwrap_or_default())
}
