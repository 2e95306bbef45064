//! Starts a loop again that panicked.
//!
//! A node whose heart beats and that has lost one of its loops would look alive and do only a part of its
//! work. What a loop held when it panicked is dropped with it: claimed messages come back when their leases
//! end, because only who has a message at hand keeps its lease ([`Leases`](super::Leases)).

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

/// How long to wait before a loop is started again; it doubles up to the longest pause while the loop
/// panics again at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Runs a loop until it returns.
pub(super) async fn again<F: Future<Output = ()>>(
    what: &str,
    stop: CancellationToken,
    mut start: impl FnMut() -> F,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        let Err(panic) = AssertUnwindSafe(start()).catch_unwind().await else {
            return;
        };
        if begun.elapsed() > 2 * LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        tracing::error!(
            panic = panic_text(&*panic),
            ?pause,
            "{what} panicked, starting it again; this is an error in nexus, please report it"
        );
        // A loop that has to stop is started all the same: it puts things in order and returns.
        let _ = tokio::time::timeout(pause, stop.cancelled()).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

pub(super) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("with a value that is no text")
}
