//! Real input: a file of GitHub webhook deliveries becomes typed events, and three groups of
//! handlers make statistics, an audit copy and an index of them.
//!
//! `cargo run --example webhooks -- FILE.jsonl` needs nothing but a Rust toolchain and
//! Postgres's programs on the machine; with `DATABASE_URL` set it uses that server. A line is
//! `{"event": "issues", "payload": {…}}`; what is no such line is reported and skipped.
//!
//! - `events` has a type for each event that matters here, and one for all others.
//! - `handlers` has what happens with them, and the tables it happens in.
//! - `input` turns lines into events, or into the reason why not.

mod arguments;
mod console;
mod events;
mod handlers;
mod input;
mod summary;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use indicatif::ProgressDrawTarget;
use nexus::{EmitError, Handle, prelude::*};
use tokio::task::JoinSet;

pub(crate) use self::{arguments::Arguments, console::Console, input::Input};
use self::{events::Webhook, input::Line, summary::Summary};

/// Emits under way at once: they share the pool, of 20 connections, with the handlers.
const EMITS_AT_ONCE: usize = 16;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    console::log_to_stderr();
    let mut console = Console::new(ProgressDrawTarget::stderr(), io::stderr());
    let finished = match Input::open(&arguments.file) {
        Ok(input) => {
            run(
                &arguments,
                App::discover(),
                input,
                &mut console,
                &mut io::stdout(),
            )
            .await
        }
        Err(error) => Err(error),
    };
    match finished {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console.say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts the app, feeds it with the input, and stops it when everything is handled.
pub(crate) async fn run(
    arguments: &Arguments,
    app: App,
    input: Input,
    console: &mut Console,
    output: &mut impl Write,
) -> nexus::Result {
    let handle = nexus::start(app.name("webhooks").namespace(&arguments.namespace)).await?;
    let worked = tokio::select! {
        worked = work(&handle, arguments, input, console) => worked,
        _ = tokio::signal::ctrl_c() => {
            Err("interrupted; what has been emitted is kept, and handled by the next run".into())
        }
    };
    console.clear();
    let printed = match worked {
        Ok(summary) if arguments.json => summary.print_json(output),
        Ok(summary) => summary.print_tables(output),
        Err(error) => {
            handle.shutdown().await;
            return Err(error);
        }
    };
    handle.shutdown().await;
    match printed {
        // Whoever closed the pipe has read what was wanted; the work is done.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| format!("could not print the summary: {error}").into()),
    }
}

async fn work(
    handle: &Handle,
    arguments: &Arguments,
    input: Input,
    console: &mut Console,
) -> nexus::Result<Summary> {
    handlers::create_tables(handle.client().pool()).await?;
    let newest_before = summary::newest_event(handle).await?;
    let lines = emit_lines(handle, arguments.idempotent, input, console).await?;
    handle_all(handle, console).await?;
    Summary::of_this_run(handle, newest_before, lines).await
}

/// What became of the lines. What was neither rejected nor emitted is a repetition.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lines {
    pub(crate) read: u64,
    pub(crate) rejected: u64,
}

/// Emits line after line, some at once. Handlers are at work meanwhile.
async fn emit_lines(
    handle: &Handle,
    idempotent: bool,
    input: Input,
    console: &mut Console,
) -> nexus::Result<Lines> {
    let mut lines = Lines::default();
    console.start_reading(input.bytes());
    let mut incoming = input.read(idempotent);
    let mut emits = JoinSet::new();
    while let Some(line) = incoming.recv().await {
        let Line {
            number,
            bytes,
            idempotency_key,
            webhook,
        } = line?;
        lines.read = number;
        match webhook {
            Ok(webhook) => {
                if emits.len() >= EMITS_AT_ONCE
                    && let Some(emitted) = emits.join_next().await
                {
                    lines.take(emitted?, console)?;
                }
                let client = handle.client().clone();
                emits
                    .spawn(async move { (number, emit(&client, &webhook, idempotency_key).await) });
            }
            Err(reason) => lines.reject(number, &reason, console),
        }
        console.advance(bytes, lines, handle);
    }
    while let Some(emitted) = emits.join_next().await {
        lines.take(emitted?, console)?;
    }
    Ok(lines)
}

async fn emit(client: &Client, webhook: &Webhook, key: Option<String>) -> Result<(), EmitError> {
    let emission = webhook.emission(client);
    let emitted = match key {
        Some(key) => emission.idempotency_key(key).await,
        None => emission.await,
    };
    match emitted {
        // The line was emitted by a build of this example that took other fields from it.
        Ok(_) | Err(EmitError::KeyUsedForAnotherEvent { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl Lines {
    /// An event that cannot be stored is the fault of its line; any other failure ends the run.
    fn take(
        &mut self,
        (number, emitted): (u64, Result<(), EmitError>),
        console: &mut Console,
    ) -> nexus::Result {
        match emitted {
            Ok(()) => Ok(()),
            Err(EmitError::Encode(reason)) => {
                self.reject(number, &reason.to_string(), console);
                Ok(())
            }
            Err(error) => Err(Error::from(error)),
        }
    }

    fn reject(&mut self, number: u64, reason: &str, console: &mut Console) {
        self.rejected += 1;
        console.say(&format!("line {number}: {reason}"));
    }
}

/// Waits until every message is handled, those of an earlier run that was interrupted included.
async fn handle_all(handle: &Handle, console: &mut Console) -> nexus::Result {
    let idle = handle.idle();
    tokio::pin!(idle);
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            finished = &mut idle => return Ok(finished?),
            _ = ticks.tick() => console.show_handled(handle),
        }
    }
}
