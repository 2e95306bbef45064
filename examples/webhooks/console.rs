//! Standard error: a progress bar on a terminal, and messages that do not tear it.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nexus::Handle;

use super::{Lines, summary};

/// Where a run tells how it goes.
pub(crate) struct Console {
    bar: ProgressBar,
    messages: Box<dyn Write + Send>,
}

impl Console {
    /// A bar that is drawn there if that is a terminal, and a place for messages.
    pub(crate) fn new(bar: ProgressDrawTarget, messages: impl Write + Send + 'static) -> Self {
        Self {
            bar: ProgressBar::with_draw_target(None, bar),
            messages: Box::new(messages),
        }
    }

    /// Prints a line, above the bar if there is one.
    pub(crate) fn say(&mut self, text: &str) {
        let Self { bar, messages } = self;
        // Nobody reads it if standard error is closed, which is no reason to stop.
        let _ = bar.suspend(|| writeln!(messages, "{text}"));
    }

    pub(crate) fn start_reading(&mut self, bytes: Option<u64>) {
        let template = match bytes {
            Some(bytes) => {
                self.bar.set_length(bytes);
                "reading  [{bar:30}] {percent:>3} %  {msg}"
            }
            None => "reading  {spinner} {binary_bytes}  {msg}",
        };
        self.bar.set_style(style(template));
    }

    /// A line was read.
    pub(crate) fn advance(&mut self, bytes: u64, lines: Lines, handle: &Handle) {
        self.bar.inc(bytes);
        if !self.bar.is_hidden() {
            let (handled, _) = summary::finished(handle);
            let Lines { read, rejected } = lines;
            self.bar.set_message(format!(
                "{read} lines, {rejected} rejected, {handled} handled"
            ));
        }
    }

    /// Everything is read, and what was emitted is being handled.
    pub(crate) fn show_handled(&mut self, handle: &Handle) {
        if !self.bar.is_hidden() {
            let (handled, dead_lettered) = summary::finished(handle);
            self.bar.set_style(style("handling {spinner} {msg}"));
            self.bar
                .set_message(format!("{handled} handled, {dead_lettered} dead-lettered"));
            self.bar.tick();
        }
    }

    pub(crate) fn clear(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates are constant and right")
}

/// Shows warnings; `CORE_LOG_LEVEL` may ask for more. That statements wait for the row of a busy
/// repository is none.
pub(crate) fn log_to_stderr() {
    let filter = std::env::var("CORE_LOG_LEVEL")
        .ok()
        .and_then(|filter| tracing_subscriber::EnvFilter::try_new(filter).ok())
        .unwrap_or_else(|| tracing_subscriber::EnvFilter::new("warn,sqlx::query=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
}
