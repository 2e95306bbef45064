//! `nexus groups`

use clap::{Args, Subcommand};
use nexus::client::{Depth, Group, Leftovers};
use nexus_http::documents;
use serde_json::json;

use super::count;
use crate::{
    console::{BAD, Cell, Console, Table, WARN},
    moments::short,
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Groups {
    /// List the groups, with what waits in their queues; counted up to 1000
    #[command(after_help = "Example: nexus groups list --namespace shop")]
    List,
    /// Let no node claim messages of a group until it is resumed
    #[command(after_help = "\
What nodes have claimed already is handled. Events are delivered as ever, so messages gather in the queue.

Example: nexus groups pause billing")]
    Pause {
        /// The group
        group: String,
    },
    /// Let the messages of a paused group be claimed again
    #[command(after_help = "Example: nexus groups resume billing")]
    Resume {
        /// The group
        group: String,
    },
    /// Retire the subscription of a handler that no live build declares
    Retire(Retire),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Its messages become dead letters of the group, unless --drop is given. Its dead letters stay.

Example: nexus groups retire billing book_invoice --dry-run")]
pub(crate) struct Retire {
    /// The group
    group: String,
    /// The handler
    handler: String,
    /// Delete its messages instead; the events stay in the log
    #[arg(long)]
    drop: bool,
    /// Only tell how many messages that are
    #[arg(long)]
    dry_run: bool,
}

impl Groups {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::List => {
                let groups = session.client.groups().await?;
                if console.is_json {
                    return console.print_json_list(groups.into_iter().map(documents::Group::from));
                }
                if groups.is_empty() {
                    return console.print("there is no group\n");
                }
                console.print(&table(&groups).text(""))
            }
            Self::Pause { group } => {
                session.client.pause_group(&group).await?;
                show(&group, session, console).await
            }
            Self::Resume { group } => {
                session.client.resume_group(&group).await?;
                show(&group, session, console).await
            }
            Self::Retire(retire) => retire.run(session, console).await,
        }
    }
}

/// Shows a group as it is now.
async fn show(group: &str, session: &Session, console: &Console) -> anyhow::Result<()> {
    let groups = session.client.groups().await?;
    let groups: Vec<Group> = groups
        .into_iter()
        .filter(|shown| shown.name == group)
        .collect();
    if console.is_json {
        return console.print_json_list(groups.into_iter().map(documents::Group::from));
    }
    console.print(&table(&groups).text(""))
}

pub(super) fn table(groups: &[Group]) -> Table {
    let mut table = Table::new([
        "group",
        ">messages",
        ">failed before",
        ">oldest ready",
        ">dead letters",
        ">handlers",
        "without a live node",
    ]);
    for group in groups {
        let silent: Vec<&str> = group
            .handlers
            .iter()
            .filter(|handler| !handler.is_live)
            .map(|handler| handler.name.as_str())
            .collect();
        let more = if group.depth.is_more { "+" } else { "" };
        let failed = format!("{}{more}", group.failed);
        let name = match group.paused_at {
            Some(_) => Cell::new(format!("{} (paused)", group.name), WARN),
            None => (&group.name).into(),
        };
        table.row([
            name,
            group.depth.to_string().into(),
            if group.failed > 0 {
                Cell::new(failed, WARN)
            } else {
                "0".into()
            },
            group.lag().map(short).unwrap_or_default().into(),
            if group.dead_letters == Depth::default() {
                "0".into()
            } else {
                Cell::new(group.dead_letters.to_string(), BAD)
            },
            group.handlers.len().to_string().into(),
            Cell::new(silent.join(", "), WARN),
        ]);
    }
    table
}

impl Retire {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let (client, group, handler) = (&session.client, &self.group, &self.handler);
        let plan = client.retire_dry_run(group, handler).await?;
        let fate = if self.drop { "deleted" } else { "dead letters" };
        let messages = count(plan.messages, "message");
        let (done, left) = if self.dry_run {
            (plan, None)
        } else {
            session.ask(console, &format!(
                    "{group}/{handler} is sent nothing any more, and {messages} of it will be {fate}"
                ))
                .await?;
            console.begin("moving messages");
            let leftovers = if self.drop {
                Leftovers::Drop
            } else {
                Leftovers::KeepAsDeadLetters
            };
            let done = client.retire(group, handler, leftovers).await;
            console.clear();
            let done = done?;
            let left = done.left;
            (done, Some(left))
        };
        if console.is_json {
            return console.print_json(&json!({
                "group": group,
                "handler": handler,
                "messages": done.messages,
                "left": left.unwrap_or(0),
                "isDryRun": self.dry_run,
            }));
        }
        let messages = count(done.messages, "message");
        match left {
            None => console.print(&format!(
                "{group}/{handler} would be retired, and {messages} would be {fate}\n"
            )),
            Some(0) => console.print(&format!(
                "{group}/{handler} is retired; {messages}: {fate}\n"
            )),
            Some(left) => console.print(&format!(
                "{group}/{handler} is retired; {messages}: {fate}, {left} of them once a node gets to it\n"
            )),
        }
    }
}
