use std::{io::IsTerminal, time::Duration};

use super::{App, StartError, start, start::environment};
use crate::config::{self, Config, Environment};

/// Connects, migrates, registers, and works until SIGINT or SIGTERM; then stops gently. A second
/// signal gives up what still runs.
///
/// Logs to standard error, at the level of `CORE_LOG_LEVEL` (default `info`; a filter such as
/// `info,nexus=debug` works), unless the program has set up `tracing` itself.
///
/// # Errors
///
/// [`StartError`], or that this node had to stop because another took its id.
pub async fn run(app: App) -> crate::Result {
    let lookup = environment;
    let environment = Environment::new(&lookup);
    let filter = config::log_filter(&environment).map_err(|error| {
        // Told together with the others, which nobody would come to otherwise.
        let others = Config::resolve(&app.overrides, &environment).err();
        let all = std::iter::once(error).chain(others.into_iter().flatten());
        StartError::Config(all.collect())
    })?;
    // An error means that the program has a subscriber of its own.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // No colours in files and pipes.
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    let mut signals = Signals::new();
    let mut starting = Box::pin(start(app));
    let (handle, is_signalled) = tokio::select! {
        handle = &mut starting => (handle?, false),
        // What has registered is to deregister; a database that gives no answer is not waited for.
        () = signals.next() => match tokio::time::timeout(Duration::from_secs(5), starting).await {
            Ok(handle) => (handle?, true),
            Err(_) => return Ok(()),
        },
    };
    let fenced = handle.fenced();
    let was_fenced = tokio::select! {
        () = async {}, if is_signalled => false,
        () = signals.next() => false,
        () = fenced => true,
    };
    tracing::info!("stopping, a second signal stops at once");
    let abort = handle.abort();
    let mut shutdown = Box::pin(handle.shutdown());
    tokio::select! {
        _ = &mut shutdown => {}
        () = signals.next() => {
            abort.cancel();
            shutdown.await;
        }
    }
    if was_fenced {
        return Err("another process has started with this node's id".into());
    }
    Ok(())
}

/// SIGINT and SIGTERM. Made before the app starts: from then on a signal is kept until it is asked
/// for, and does not end a process that has just registered.
struct Signals {
    #[cfg(unix)]
    both: Option<[tokio::signal::unix::Signal; 2]>,
}

impl Signals {
    fn new() -> Self {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let both = signal(SignalKind::interrupt())
                .and_then(|interrupt| Ok([interrupt, signal(SignalKind::terminate())?]));
            Self { both: both.ok() }
        }
        #[cfg(not(unix))]
        Self {}
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        if let Some([interrupt, terminate]) = &mut self.both {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
        // Without a handler the signal ends the process, which is what it should do.
        let _ = tokio::signal::ctrl_c().await;
    }
}
