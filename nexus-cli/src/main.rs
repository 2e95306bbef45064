//! `nexus`: looks at what lives in a nexus database, and steers it.
//!
//! It has no SQL of its own and knows only the public API of the library.
//!
//! - `commands` has a module for each command: its arguments, what it does, how that is shown.
//! - `session` finds the database and the namespace that are meant.
//! - `console` writes: tables, JSON, questions, progress.
//! - `moments` reads and tells times and durations.
//! - `failure` says with which code the program ends.

mod commands;
mod console;
mod failure;
mod moments;
mod session;

use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::{commands as c, console::Console, session::Session};

/// Looks at typed events on Postgres, and steers what happens with them.
#[derive(Debug, Parser)]
#[command(name = "nexus", version, after_help = AFTER)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "\
Database: --database-url, else CORE_DATABASE_URL, else DATABASE_URL, each also from a file `.env`, else the embedded
database of the current folder. Namespace: --namespace, else CORE_NAMESPACE, else `demo`.

Exit codes: 0 done; 1 refused, or what was asked for is not there; 2 the command line cannot be understood, or wants
--yes; 3 the database cannot be reached or gave no answer; 4 it has no schema of nexus, or one of another version;
130 interrupted.

Example: nexus status --namespace shop";

#[derive(Debug, Args)]
struct Global {
    /// The database; never shown with its password
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help_heading = "For every command"
    )]
    database_url: Option<String>,
    /// The namespace
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        help_heading = "For every command"
    )]
    namespace: Option<String>,
    /// Print JSON: one document, whose shape stays (`tail`: one a line)
    #[arg(long, global = true, help_heading = "For every command")]
    json: bool,
    /// Do not ask
    #[arg(long, short, global = true, help_heading = "For every command")]
    yes: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show on one screen how a namespace is doing
    #[command(after_help = "Example: nexus status --namespace shop")]
    Status,
    /// Look for what is wrong, or will be, and say what helps; changes nothing
    #[command(after_help = c::doctor::AFTER)]
    Doctor,
    /// Look at the event log
    #[command(subcommand)]
    Events(c::events::Events),
    /// Emit an event of a registered type
    Emit(c::emit::Emit),
    /// Look at groups and what waits in their queues, or retire a subscription
    #[command(subcommand)]
    Groups(c::groups::Groups),
    /// Look at handlers and what they are subscribed to
    #[command(subcommand)]
    Handlers(c::handlers::Handlers),
    /// Look at dead letters, redrive or purge them
    #[command(subcommand)]
    DeadLetters(c::dead_letters::DeadLetters),
    /// Deliver events of the log once more
    #[command(subcommand)]
    Replay(c::replay::Replay),
    /// Look at scheduled tasks, make and steer them
    #[command(subcommand)]
    Schedules(c::schedules::Schedules),
    /// Look at who runs
    #[command(subcommand)]
    Nodes(c::nodes::Nodes),
    /// Look at the JSON Schemas of event types
    #[command(subcommand)]
    Schemas(c::schemas::Schemas),
    /// Look at the tokens of programs that come over HTTP, make and revoke them
    #[command(subcommand)]
    Tokens(c::tokens::Tokens),
    /// Serve the namespace over HTTP
    Serve(c::serve::Serve),
    /// Look at the schema of the database, bring it up or take it down
    #[command(subcommand)]
    Migrate(c::migrate::Migrate),
    /// Measure how fast events are emitted and handled here
    Bench(c::bench::Bench),
    /// Run SQL that only reads, unless asked, or a named query
    Sql(c::sql::Sql),
    /// Write a script that completes commands in a shell
    #[command(after_help = "Example: nexus completions bash > /etc/bash_completion.d/nexus")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    session::log_to_stderr();
    // It has its own way to stop, and work for every core.
    let is_server = matches!(cli.command, Command::Serve(_));
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if !is_server {
        runtime.worker_threads(2);
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            console::complain(&anyhow::Error::from(error));
            return ExitCode::FAILURE;
        }
    };
    // Following the log ends in no other way.
    let is_endless = matches!(cli.command, Command::Events(c::events::Events::Tail(_)));
    // Have something to tidy up before.
    let ends_itself = matches!(cli.command, Command::Bench(_) | Command::Serve(_));
    let console = Console::new(cli.global.json, cli.global.yes);
    let code = runtime.block_on(async {
        tokio::select! {
            done = run(cli, &console) => failure::code(done),
            _ = tokio::signal::ctrl_c(), if !ends_itself => {
                console.clear();
                if is_endless {
                    ExitCode::SUCCESS
                } else {
                    console.say("interrupted: what was done stays done, and the same command does the rest");
                    ExitCode::from(failure::INTERRUPTED)
                }
            }
        }
    });
    // Somebody may still be asked something, in a thread that cannot be stopped.
    runtime.shutdown_background();
    code
}

async fn run(cli: Cli, console: &Console) -> anyhow::Result<()> {
    let Cli { global, command } = cli;
    match command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "nexus", &mut script);
            return console.print(&String::from_utf8_lossy(&script));
        }
        Command::Migrate(command) => return command.run(&global, console).await,
        Command::Serve(command) => return command.run(&global, console).await,
        Command::Doctor => return c::doctor::run(&global, console).await,
        Command::Bench(command) => return command.run(&global, console).await,
        _ => {}
    }
    let session = Session::open(&global).await?;
    match command {
        Command::Status => c::status::run(&session, console).await,
        Command::Events(command) => command.run(&session, console).await,
        Command::Emit(command) => command.run(&session, console).await,
        Command::Groups(command) => command.run(&session, console).await,
        Command::Handlers(command) => command.run(&session, console).await,
        Command::DeadLetters(command) => command.run(&session, console).await,
        Command::Replay(command) => command.run(&session, console).await,
        Command::Schedules(command) => command.run(&session, console).await,
        Command::Nodes(command) => command.run(&session, console).await,
        Command::Schemas(command) => command.run(&session, console).await,
        Command::Tokens(command) => command.run(&session, console).await,
        Command::Sql(command) => command.run(&session, console).await,
        Command::Bench(_)
        | Command::Doctor
        | Command::Migrate(_)
        | Command::Serve(_)
        | Command::Completions { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_fit_together_and_every_command_has_an_example() {
        let mut program = Cli::command();
        program.build();
        program.clone().debug_assert();
        check(&program);
    }

    fn check(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string);
        let commands: Vec<_> = command
            .get_subcommands()
            .filter(|command| command.get_name() != "help")
            .collect();
        if commands.is_empty() {
            let name = command.get_bin_name().unwrap_or_default().to_owned();
            let help = help.unwrap_or_default();
            assert!(
                help.contains("Example") && help.contains(&name),
                "`{name}` has no example in its help"
            );
            let documented = include_str!("../../docs/cli.md");
            assert!(
                documented.contains(&format!("`{name}")),
                "`{name}` is not in docs/cli.md"
            );
        }
        commands.into_iter().for_each(check);
    }
}
