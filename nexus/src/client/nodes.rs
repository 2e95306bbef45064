//! Looking at who runs.

use jiff::Timestamp;

use super::{Client, OperateError};
use crate::store::nodes;

/// A node of the namespace, as it said when it started.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Node {
    /// Its id.
    pub id: String,
    /// The app that it runs.
    pub app: String,
    /// The build of the app.
    pub build_id: String,
    /// The executable's file name.
    pub program: String,
    /// The name that the app gave it.
    pub display_name: Option<String>,
    /// When it started.
    pub started_at: Timestamp,
    /// When it was last heard of.
    pub last_heartbeat: Timestamp,
    /// Whether that is less than 15 seconds ago. What a node holds that is not live is handled elsewhere.
    pub is_live: bool,
    /// What it can run.
    pub handlers: Vec<NodeHandler>,
}

/// A handler that a node can run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeHandler {
    /// The group.
    pub group: String,
    /// The handler.
    pub handler: String,
    /// The event type.
    pub event_type: String,
    /// The version of it.
    pub event_version: u32,
}

impl Client {
    /// The nodes of the namespace, by app and id. A node that stops in an orderly way leaves the list; one that
    /// died stays for a while, and [is not live](Node::is_live).
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// for node in client.nodes().await? {
    ///     println!("{} {} live: {}", node.app, node.id, node.is_live);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn nodes(&self) -> Result<Vec<Node>, OperateError> {
        let listed = async {
            let mut connection = self.lend().await?;
            let rows = nodes::list(&mut connection, self.namespace()).await?;
            connection.give_back().await?;
            Ok(rows)
        };
        let rows = self.asked("list nodes", listed).await?;
        Ok(rows
            .into_iter()
            .map(|row| Node {
                id: row.id,
                app: row.app,
                build_id: row.build_id,
                program: row.program,
                display_name: row.display_name,
                started_at: row.registered_at,
                last_heartbeat: row.last_heartbeat,
                is_live: row.is_live,
                handlers: row
                    .handlers
                    .into_iter()
                    .map(|handler| NodeHandler {
                        group: handler.group,
                        handler: handler.handler,
                        event_type: handler.event_type,
                        event_version: handler.event_version,
                    })
                    .collect(),
            })
            .collect())
    }

    /// Forgets the nodes of the namespace that are not live, and returns their ids. Nodes forget those that have
    /// been silent for a day; nothing depends on it. One that is alive after all registers again.
    ///
    /// # Errors
    ///
    /// The role may not, or the database could not be asked.
    pub async fn reap_nodes(&self) -> Result<Vec<String>, OperateError> {
        let reaped = async {
            let mut connection = self.lend().await?;
            let reaped = nodes::reap(&mut connection, self.namespace()).await?;
            connection.give_back().await?;
            Ok(reaped)
        };
        self.asked("forget silent nodes", reaped).await
    }
}
