use std::path::PathBuf;

use clap::Parser;

/// Emits the GitHub webhook deliveries of a file as typed events, and handles them.
#[derive(Debug, Parser)]
#[command(name = "webhooks", after_help = EXPLANATION)]
pub(crate) struct Arguments {
    /// A file with one delivery a line, `{"event": "issues", "payload": {…}}`; `-` is standard input
    pub(crate) file: PathBuf,

    /// Print a summary for programs, one line of JSON at the end of standard output
    #[arg(long)]
    pub(crate) json: bool,

    /// Emit a line once, however often it is read within 24 hours: a hash of its content is the
    /// idempotency key
    #[arg(long)]
    pub(crate) idempotent: bool,

    /// The namespace to emit in; another one has its own statistics
    #[arg(long, default_value = "webhooks")]
    pub(crate) namespace: String,
}

const EXPLANATION: &str = "\
Every line counts. A line that is not JSON, is blank, has no such shape, does not fit the type of
its event or cannot be stored is reported on standard error as `line 17: …` and skipped; that is no
failure. So `lines` is `emitted` + `rejected`, and with --idempotent also what had been emitted before.

Events are stored as `github.NAME` for the names issues, issue_comment, pull_request,
pull_request_review, push, release, star, fork, check_run and workflow_run, with the fields that
matter. A delivery of any other name is stored as `github.other`, with its name and its whole payload.

The summary of --json: {\"lines\", \"emitted\", \"rejected\", \"handled\", \"dead_lettered\", \"by_type\"}.
`by_type` counts what was emitted by the type it is stored as: all other names are together in
`github.other`. `handled` and `dead_lettered` count messages, of which every event has three: one for
each of the groups `webhooks` (statistics), `audit` and `index`.

The database: DATABASE_URL, else one that is started for you. Tables: webhooks_repositories,
webhooks_audit, webhooks_index. CORE_LOG_LEVEL says how much is logged, default `warn`.";
