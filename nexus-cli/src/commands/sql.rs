//! `nexus sql`

use std::fmt::Write as _;

use anyhow::Context as _;
use clap::Args;
use nexus::client::{CannedQuery, SqlAccess, SqlOutcome, canned_queries};
use serde_json::{Map, Value, json};

use super::count;
use crate::{
    console::{Cell, Console, DIM, Table, cut},
    session::Session,
};

#[derive(Debug, Args)]
#[command(after_help = "\
Without --write the server refuses what changes anything. Without an argument, the named queries are listed.

Examples: nexus sql events-by-type
          nexus sql \"select event_type, count(*) from core.event_log where emitted_at > now() - interval '1 hour' group by 1\"")]
pub(crate) struct Sql {
    /// SQL, the name of a query, or - to read SQL from standard input
    #[arg(value_name = "SQL")]
    given: Option<String>,
    /// Let it change something
    #[arg(long)]
    write: bool,
    /// At most so many rows of each statement
    #[arg(long, default_value_t = 1_000)]
    limit: usize,
}

impl Sql {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let canned = canned_queries();
        let Some(given) = self.given else {
            return list(&canned, console);
        };
        let text = match canned.iter().find(|query| query.name == given) {
            Some(query) => query.sql.to_owned(),
            None if given == "-" => std::io::read_to_string(std::io::stdin())
                .context("could not read the SQL from standard input")?,
            None => given,
        };
        let access = if self.write {
            let what = format!("SQL that may change {} will be run", session.target);
            console.ask(&what).await?;
            SqlAccess::Write
        } else {
            SqlAccess::ReadOnly
        };
        console.begin("running");
        let outcomes = session.client.sql(&text, access, self.limit).await;
        console.clear();
        let outcomes = outcomes?;
        if console.is_json {
            return console.print_json_list(outcomes.iter().map(document));
        }
        let mut text = String::new();
        for (index, outcome) in outcomes.iter().enumerate() {
            if index > 0 {
                text.push('\n');
            }
            tell(outcome, &mut text);
        }
        console.print(&text)
    }
}

fn list(canned: &[CannedQuery], console: &Console) -> anyhow::Result<()> {
    if console.is_json {
        let documents = canned
            .iter()
            .map(|query| json!({ "name": query.name, "about": query.about, "sql": query.sql }));
        return console.print_json_list(documents);
    }
    let mut table = Table::new(["query", "shows"]);
    for query in canned {
        table.row([query.name.into(), query.about.into()]);
    }
    console.print(&table.text(""))
}

fn document(outcome: &SqlOutcome) -> Value {
    let rows = outcome.rows.iter().map(|row| {
        let columns = outcome.columns.iter().cloned();
        Value::Object(columns.zip(row.iter().cloned()).collect::<Map<_, _>>())
    });
    json!({
        "rows": rows.collect::<Value>(),
        "isMore": outcome.is_cut,
        "affected": outcome.affected,
    })
}

fn tell(outcome: &SqlOutcome, text: &mut String) {
    if !outcome.rows.is_empty() {
        let mut table = Table::named(&outcome.columns);
        for row in &outcome.rows {
            table.push(row.iter().map(cell).collect());
        }
        text.push_str(&table.text(""));
    }
    let rows = if outcome.is_cut {
        format!("the first {}", count(outcome.rows.len() as u64, "row"))
    } else {
        count(outcome.affected, "row")
    };
    let _ = writeln!(text, "{DIM}{rows}{DIM:#}");
}

fn cell(value: &Value) -> Cell {
    match value {
        Value::Null => Cell::new("null", DIM),
        Value::String(text) => cut(text, 200).into(),
        other => cut(&other.to_string(), 200).into(),
    }
}
