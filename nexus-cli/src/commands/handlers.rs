//! `nexus handlers`

use clap::Subcommand;
use nexus::client::{Group, GroupHandler, Node};
use nexus_http::documents;
use serde::Serialize;

use crate::{
    console::{BAD, Cell, Console, GOOD, Table},
    moments::short,
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Handlers {
    /// List the handlers and what they are subscribed to
    #[command(after_help = "Example: nexus handlers list --group billing")]
    List {
        /// Only those of this group
        #[arg(long)]
        group: Option<String>,
    },
    /// Show a handler, and which nodes can run it
    #[command(after_help = "Example: nexus handlers show billing/book_invoice")]
    Show {
        /// Its name, or GROUP/NAME where several groups have one of that name
        #[arg(value_name = "HANDLER")]
        name: String,
    },
}

impl Handlers {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let groups = session.client.groups().await?;
        match self {
            Self::List { group } => list(&groups, group.as_deref(), console),
            Self::Show { name } => {
                let nodes = session.client.nodes().await?;
                show(&groups, &nodes, &name, console)
            }
        }
    }
}

fn list(groups: &[Group], only: Option<&str>, console: &Console) -> anyhow::Result<()> {
    if let Some(only) = only
        && !groups.iter().any(|group| group.name == only)
    {
        let known: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        anyhow::bail!("there is no group `{only}`; there are {}", known.join(", "));
    }
    let found: Vec<(&Group, &GroupHandler)> = groups
        .iter()
        .filter(|group| only.is_none_or(|only| only == group.name))
        .flat_map(|group| group.handlers.iter().map(move |handler| (group, handler)))
        .collect();
    if console.is_json {
        let documents = found
            .into_iter()
            .map(|(group, handler)| document(group, handler));
        return console.print_json_list(documents);
    }
    if found.is_empty() {
        return console.print("no handler is subscribed\n");
    }
    let mut table = Table::new([
        "handler",
        "event type",
        ">version",
        "app",
        "state",
        ">messages",
        ">oldest ready",
    ]);
    for (group, handler) in found {
        table.row([
            format!("{}/{}", group.name, handler.name).into(),
            (&handler.event_type).into(),
            handler
                .event_version
                .map(|version| version.to_string())
                .unwrap_or_default()
                .into(),
            (&handler.app).into(),
            state(handler),
            handler.depth.to_string().into(),
            handler.lag.map(short).unwrap_or_default().into(),
        ]);
    }
    console.print(&table.text(""))
}

fn document(group: &Group, handler: &GroupHandler) -> documents::Handler {
    documents::Handler::new(group.name.clone(), handler.clone())
}

/// What `show --json` prints.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    handler: documents::Handler,
    nodes: Vec<documents::Node>,
}

fn state(handler: &GroupHandler) -> Cell {
    if handler.is_live {
        Cell::new("live", GOOD)
    } else {
        Cell::new("no live node", BAD)
    }
}

fn show(groups: &[Group], nodes: &[Node], name: &str, console: &Console) -> anyhow::Result<()> {
    let all = groups
        .iter()
        .flat_map(|group| group.handlers.iter().map(move |handler| (group, handler)));
    let found: Vec<_> = all
        .filter(|(group, handler)| {
            handler.name == name || format!("{}/{}", group.name, handler.name) == name
        })
        .collect();
    let (group, handler) = match found[..] {
        [found] => found,
        [] => anyhow::bail!("no handler `{name}` is subscribed; `nexus handlers list` has all"),
        _ => {
            let names: Vec<String> = found
                .iter()
                .map(|(group, handler)| format!("{}/{}", group.name, handler.name))
                .collect();
            anyhow::bail!("several handlers are called `{name}`: {}", names.join(", "))
        }
    };
    let runs = |node: &&Node| {
        node.handlers
            .iter()
            .any(|can| can.group == group.name && can.handler == handler.name)
    };
    let able: Vec<&Node> = nodes.iter().filter(runs).collect();
    if console.is_json {
        let nodes = able.into_iter().cloned().map(documents::Node::from);
        return console.print_json(&Shown {
            handler: document(group, handler),
            nodes: nodes.collect(),
        });
    }
    let mut table = Table::new(["", ""]);
    let version = handler.event_version.map_or_else(
        || "in a version that no build has said".to_owned(),
        |version| format!("version {version}"),
    );
    let lag = handler.lag.map_or_else(
        || "nothing is ready".to_owned(),
        |lag| format!("the oldest is ready for {}", short(lag)),
    );
    let names: Vec<String> = able
        .iter()
        .map(|node| {
            let silent = if node.is_live { "" } else { " (silent)" };
            format!("{}{silent}", node.id)
        })
        .collect();
    table.row(["handler".into(), (&handler.name).into()]);
    table.row(["group".into(), (&group.name).into()]);
    table.row([
        "event type".into(),
        format!("{} {version}", handler.event_type).into(),
    ]);
    table.row(["app".into(), (&handler.app).into()]);
    table.row(["state".into(), state(handler)]);
    table.row([
        "messages".into(),
        format!("{}, {lag}", handler.depth).into(),
    ]);
    table.row(["nodes".into(), names.join(", ").into()]);
    console.print(&table.text(""))
}
