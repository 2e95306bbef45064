//! `nexus schemas`

use clap::Subcommand;
use nexus::client::DeclaredType;
use nexus_http::documents;

use crate::{
    console::{Console, Table},
    moments::relative,
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Schemas {
    /// List the event types that apps have registered
    #[command(after_help = "Example: nexus schemas list")]
    List,
    /// Print the JSON Schema of an event type
    #[command(after_help = "Example: nexus schemas show user.created --version 2")]
    Show {
        /// The event type
        event_type: String,
        /// The version; the newest if it is not given
        #[arg(long)]
        version: Option<u32>,
    },
}

impl Schemas {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let declared = session.client.event_types().await?;
        match self {
            Self::List => list(&declared, session, console),
            Self::Show {
                event_type,
                version,
            } => show(&declared, &event_type, version, session, console),
        }
    }
}

fn list(declared: &[DeclaredType], session: &Session, console: &Console) -> anyhow::Result<()> {
    if console.is_json {
        return console.print_json_list(declared.iter().cloned().map(documents::EventType::from));
    }
    if declared.is_empty() {
        return console.print("no app has registered an event type\n");
    }
    let mut table = Table::new(["event type", ">version", "app", "registered"]);
    for declared in declared {
        table.row([
            (&declared.event_type).into(),
            declared.version.to_string().into(),
            (&declared.app).into(),
            relative(session.now, declared.registered_at).into(),
        ]);
    }
    console.print(&table.text(""))
}

fn show(
    declared: &[DeclaredType],
    event_type: &str,
    version: Option<u32>,
    session: &Session,
    console: &Console,
) -> anyhow::Result<()> {
    let of_type: Vec<_> = declared
        .iter()
        .filter(|declared| declared.event_type == event_type)
        .collect();
    let found = of_type
        .iter()
        .find(|declared| version.is_none_or(|version| version == declared.version));
    match (found, version) {
        (Some(declared), _) if console.is_json => {
            let declared = DeclaredType::clone(declared);
            console.print_json(&documents::EventTypeWithSchema::from(declared))
        }
        (Some(declared), _) => console.print_json(&declared.schema),
        (None, Some(version)) if !of_type.is_empty() => {
            let mut known: Vec<u32> = of_type.iter().map(|declared| declared.version).collect();
            known.dedup();
            let versions: Vec<String> = known.iter().map(ToString::to_string).collect();
            anyhow::bail!(
                "event type `{event_type}` has no version {version}; it has {}",
                versions.join(", ")
            )
        }
        _ => {
            let mut known: Vec<&str> = declared
                .iter()
                .map(|declared| declared.event_type.as_str())
                .collect();
            known.dedup();
            anyhow::bail!(
                "no app of namespace `{}` has declared event type `{event_type}`; declared are {}",
                session.client.namespace(),
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            )
        }
    }
}
