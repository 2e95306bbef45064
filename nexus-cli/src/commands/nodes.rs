//! `nexus nodes`

use clap::Subcommand;
use nexus::{client::Node, jiff::Timestamp};
use nexus_http::documents;
use serde_json::json;

use super::count;
use crate::{
    console::{BAD, Cell, Console, GOOD, Table, indented},
    moments::relative,
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Nodes {
    /// List the nodes, live ones and those that died a while ago
    #[command(after_help = "Example: nexus nodes list --namespace shop")]
    List,
    /// Forget the nodes that are silent; one that is alive after all registers again
    #[command(after_help = "Example: nexus nodes reap --dry-run")]
    Reap {
        /// Only tell which they are
        #[arg(long)]
        dry_run: bool,
    },
}

impl Nodes {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let nodes = session.client.nodes().await?;
        match self {
            Self::List if console.is_json => {
                console.print_json_list(nodes.into_iter().map(documents::Node::from))
            }
            Self::List if nodes.is_empty() => console.print("no node is registered\n"),
            Self::List => console.print(&table(&nodes, session.now).text("")),
            Self::Reap { dry_run } => reap(&nodes, dry_run, session, console).await,
        }
    }
}

async fn reap(
    nodes: &[Node],
    is_dry: bool,
    session: &Session,
    console: &Console,
) -> anyhow::Result<()> {
    let silent = nodes.iter().filter(|node| !node.is_live);
    let mut ids: Vec<String> = silent.map(|node| node.id.clone()).collect();
    if !is_dry && !ids.is_empty() {
        let what = format!(
            "{} will be forgotten: {}",
            count(ids.len() as u64, "node"),
            ids.join(", ")
        );
        session.ask(console, &what).await?;
        ids = session.client.reap_nodes().await?;
    }
    if console.is_json {
        return console.print_json(&json!({ "nodes": ids, "isDryRun": is_dry }));
    }
    let would = if is_dry { " would be" } else { "" };
    let number = count(ids.len() as u64, "node");
    console.print(&format!(
        "{number}{would} forgotten\n{}",
        indented(&ids.join("\n"))
    ))
}

fn table(nodes: &[Node], now: Timestamp) -> Table {
    let mut table = Table::new([
        "node",
        "state",
        "heartbeat",
        "app",
        "program",
        "started",
        ">handlers",
    ]);
    for node in nodes {
        table.row([
            (&node.id).into(),
            state(node),
            relative(now, node.last_heartbeat).into(),
            (&node.app).into(),
            (&node.program).into(),
            relative(now, node.started_at).into(),
            node.handlers.len().to_string().into(),
        ]);
    }
    table
}

fn state(node: &Node) -> Cell {
    if node.is_live {
        Cell::new("live", GOOD)
    } else {
        Cell::new("silent", BAD)
    }
}
