//! `nexus nodes`

use clap::Subcommand;
use nexus::{client::Node, jiff::Timestamp};
use serde_json::{Value, json};

use crate::{
    console::{BAD, Cell, Console, GOOD, Table},
    moments::relative,
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Nodes {
    /// List the nodes, live ones and those that died a while ago
    #[command(after_help = "Example: nexus nodes list --namespace shop")]
    List,
}

impl Nodes {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let Self::List = self;
        let nodes = session.client.nodes().await?;
        if console.is_json {
            return console.print_json(&nodes.iter().map(document).collect());
        }
        if nodes.is_empty() {
            return console.print("no node is registered\n");
        }
        console.print(&table(&nodes, session.now).text(""))
    }
}

pub(super) fn document(node: &Node) -> Value {
    let handlers = node.handlers.iter().map(|handler| {
        json!({
            "group": handler.group,
            "handler": handler.handler,
            "eventType": handler.event_type,
            "eventVersion": handler.event_version,
        })
    });
    json!({
        "nodeId": node.id,
        "app": node.app,
        "buildId": node.build_id,
        "program": node.program,
        "displayName": node.display_name,
        "startedAt": node.started_at,
        "lastHeartbeat": node.last_heartbeat,
        "isLive": node.is_live,
        "handlers": handlers.collect::<Value>(),
    })
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
