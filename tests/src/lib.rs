//! Fault helpers of the nexus test suites. Databases and clocks come from `nexus::testing`.

use std::{
    future::Future,
    io,
    panic::UnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

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

/// Checks that a program which mentions the crates `mentioned` of `tests/crates` has linked their handlers, and
/// those of the crates that are reached through them, each once, and nothing else.
///
/// # Panics
///
/// If something is missing or too much; with all that was linked.
pub fn check_linked(app: &nexus::App, mentioned: &[&str]) {
    let description = app.describe();
    let expected: Vec<&str> = [
        ("nexus_test_billing", "book_invoice"),
        ("nexus_test_billing", "price_product"),
        ("nexus_test_billing", "remind"),
        // Reached through both others.
        ("", "index_product"),
        ("nexus_test_returns", "allow_returns"),
        ("nexus_test_shipping", "call_carrier"),
        ("nexus_test_shipping", "count_label"),
        ("nexus_test_shipping", "measure_product"),
    ]
    .into_iter()
    .filter(|(through, _)| through.is_empty() || mentioned.contains(through))
    .map(|(_, handler)| handler)
    .collect();
    let found: Vec<&str> = description
        .handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    assert_eq!(found, expected, "{description}");
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

/// A writer for `tracing_subscriber` that keeps what is logged; each clone has the same text.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// What has been logged until now.
    pub fn text(&self) -> String {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
