//! `nexus doctor`

use std::fmt::Write as _;

use nexus::client::{Finding, Severity};
use serde_json::{Value, json};

use super::count;
use crate::{
    Global,
    console::{BAD, Console, DIM, GOOD, WARN, safe},
    session::{Missing, Place, explain},
};

pub(crate) const AFTER: &str = "\
Looks at the server, the schema and a namespace, also where there is no schema or one of another version, and as a role with \
few rights. Each finding says what helps. Returns 1 if there is an error or a warning, 0 if there are only notes.

Example: nexus doctor --namespace shop";

pub(crate) async fn run(global: &Global, console: &Console) -> anyhow::Result<()> {
    let place = Place::find(global, Missing::IsAnError).await?;
    let database = &place.database;
    console.begin("looking");
    let found = database.diagnose(&place.namespace).await;
    console.clear();
    let found = found.map_err(|error| explain(error, database))?;
    if console.is_json {
        console.print_json_list(found.iter().map(document))?;
    } else {
        console.print(&text(&found))?;
    }
    let number = |severity| {
        let of_it = found.iter().filter(|finding| finding.severity == severity);
        of_it.count() as u64
    };
    let (errors, warnings) = (number(Severity::Error), number(Severity::Warning));
    anyhow::ensure!(
        errors + warnings == 0,
        "something is wrong: {}, {}",
        count(errors, "error"),
        count(warnings, "warning")
    );
    Ok(())
}

fn document(finding: &Finding) -> Value {
    json!({
        "id": finding.id,
        "severity": finding.severity.to_string(),
        "subject": finding.subject,
        "what": finding.what,
        "help": finding.help,
    })
}

fn text(found: &[Finding]) -> String {
    let mut text = String::new();
    for finding in found {
        let style = match finding.severity {
            Severity::Error => BAD,
            Severity::Warning => WARN,
            _ => DIM,
        };
        let _ = writeln!(
            text,
            "{style}{:<8}{style:#} {} {DIM}[{}]{DIM:#}\n         {DIM}→{DIM:#} {}",
            finding.severity,
            safe(&finding.what),
            finding.id,
            safe(&finding.help)
        );
    }
    if found
        .iter()
        .all(|finding| finding.severity == Severity::Note)
    {
        let _ = writeln!(text, "{GOOD}nothing is wrong{GOOD:#}");
    }
    text
}
