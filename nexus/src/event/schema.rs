//! Holds a payload to the schema that its event type has.

use std::fmt;

use boon::{
    CompileError, Compiler, ErrorKind, Format, InstanceLocation, InstanceToken, Schemas, UrlLoader,
    ValidationError,
};
use serde_json::Value;

/// Most problems of one payload that are told.
const MOST: usize = 20;

/// What is wrong with a payload, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PayloadProblem {
    /// The place in the payload, such as `lines[2].amount`; empty for the payload itself.
    pub path: String,
    /// What is wrong there.
    pub problem: String,
}

impl fmt::Display for PayloadProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            write!(f, "the payload: {}", self.problem)
        } else {
            write!(f, "at `{}`: {}", self.path, self.problem)
        }
    }
}

/// Why a payload does not pass.
#[derive(Debug)]
pub(crate) enum Misfit {
    /// The schema itself cannot be used.
    Schema(String),
    Payload(Vec<PayloadProblem>),
}

/// A schema stands for itself: nothing that it refers to elsewhere is read, no file and no address.
struct NothingElse;

impl UrlLoader for NothingElse {
    fn load(&self, url: &str) -> Result<Value, Box<dyn std::error::Error>> {
        Err(format!("the schema refers to {url}, and only what is in it can be used").into())
    }
}

const SCHEMA: &str = "nexus:///event";

/// Checks a payload against a JSON Schema. Formats count (`uuid`, `date-time` …), but for `duration`, whose
/// grammar knows no fractions of a second.
pub(crate) fn check_payload(schema: Value, payload: &Value) -> Result<(), Misfit> {
    let unusable = |error: CompileError| Misfit::Schema(error.to_string());
    let mut schemas = Schemas::new();
    let mut compiler = Compiler::new();
    compiler.use_loader(Box::new(NothingElse));
    compiler.enable_format_assertions();
    compiler.register_format(Format {
        name: "duration",
        func: |_| Ok(()),
    });
    compiler.add_resource(SCHEMA, schema).map_err(unusable)?;
    let index = compiler.compile(SCHEMA, &mut schemas).map_err(unusable)?;
    schemas.validate(payload, index).map_err(|error| {
        let mut problems = Vec::new();
        tell(&error, &mut problems);
        problems.truncate(MOST);
        Misfit::Payload(problems)
    })
}

/// Collects what is at the bottom of an error.
fn tell(error: &ValidationError<'_, '_>, problems: &mut Vec<PayloadProblem>) {
    let alternatives = matches!(error.kind, ErrorKind::AnyOf | ErrorKind::OneOf(None));
    // Of alternatives the one that got furthest into the payload is the one that was meant.
    let furthest = if alternatives {
        error.causes.iter().map(depth).max().unwrap_or(0)
    } else {
        0
    };
    let is_told_by_causes = !alternatives || furthest > error.instance_location.tokens.len();
    if error.causes.is_empty() || !is_told_by_causes {
        let problem = PayloadProblem {
            path: path(&error.instance_location),
            problem: if alternatives {
                "fits none of the alternatives".to_owned()
            } else {
                error.kind.to_string()
            },
        };
        if !problems.contains(&problem) {
            problems.push(problem);
        }
        return;
    }
    for cause in &error.causes {
        if depth(cause) >= furthest {
            tell(cause, problems);
        }
    }
}

/// How far into the payload an error lies.
fn depth(error: &ValidationError<'_, '_>) -> usize {
    let own = error.instance_location.tokens.len();
    error.causes.iter().map(depth).fold(own, usize::max)
}

/// As `serde_path_to_error` writes places.
fn path(location: &InstanceLocation<'_>) -> String {
    let mut path = String::new();
    for token in &location.tokens {
        match token {
            InstanceToken::Prop(name) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
            }
            InstanceToken::Item(index) => {
                path.push('[');
                path.push_str(&index.to_string());
                path.push(']');
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde_json::json;

    use super::*;

    #[derive(JsonSchema)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    struct Order {
        id: uuid::Uuid,
        lines: Vec<Line>,
        note: Option<Note>,
        paid: Paid,
    }

    #[derive(JsonSchema)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    struct Line {
        amount: u8,
    }

    #[derive(JsonSchema)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    struct Note {
        text: String,
    }

    #[derive(JsonSchema)]
    #[expect(dead_code, reason = "only its schema is looked at")]
    enum Paid {
        No,
        By { card: String },
    }

    fn problems(payload: &Value) -> Vec<String> {
        let schema = schemars::schema_for!(Order).to_value();
        match check_payload(schema, payload) {
            Ok(()) => Vec::new(),
            Err(Misfit::Payload(problems)) => problems.iter().map(ToString::to_string).collect(),
            Err(Misfit::Schema(error)) => panic!("{error}"),
        }
    }

    fn order() -> Value {
        json!({
            "id": "0b5c1f2e-1111-4222-8333-444455556666",
            "lines": [{"amount": 1}, {"amount": 255}],
            "note": {"text": "soon"},
            "paid": "No",
        })
    }

    #[test]
    fn what_fits_passes() {
        assert!(problems(&order()).is_empty());
        let mut other = order();
        other["note"] = Value::Null;
        other["paid"] = json!({"By": {"card": "1"}});
        assert!(problems(&other).is_empty());
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let mut bad = order();
        bad["lines"] = json!([{"amount": "one"}, {"amount": 256}, {}]);
        let told = problems(&bad);
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told[0].starts_with("at `lines[0].amount`: "), "{told:?}");
        assert!(told[1].starts_with("at `lines[1].amount`: "), "{told:?}");
        assert!(
            told[2].starts_with("at `lines[2]`: ") && told[2].contains("amount"),
            "{told:?}"
        );

        bad = order();
        bad["id"] = json!("seven");
        bad["note"] = json!({"text": 7});
        let told = problems(&bad);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("uuid"), "{told:?}");
        assert_eq!(told[1], "at `note.text`: want string, but got number");

        bad = order();
        bad["paid"] = json!("Perhaps");
        assert_eq!(problems(&bad), ["at `paid`: fits none of the alternatives"]);
        assert!(problems(&json!(null))[0].starts_with("the payload: "));
    }

    #[test]
    fn a_schema_reads_nothing_outside_of_itself() {
        for place in ["file:///etc/passwd", "http://localhost/schema.json"] {
            let error = check_payload(json!({ "$ref": place }), &json!(1)).unwrap_err();
            assert!(
                matches!(&error, Misfit::Schema(text) if text.contains(place)),
                "{error:?}"
            );
        }
    }
}
