//! The events: of what GitHub sends, the fields that matter here.
//!
//! Payloads keep GitHub's names, so what is stored is a part of what was sent. A field is an
//! `Option` where GitHub may leave it out or send `null`: a deleted user, an event of an
//! organization, a check that has not ended.

#![expect(clippy::struct_field_names, reason = "the names are GitHub's")]

use nexus::{client::Emission, prelude::*};
use serde_json::{Map, Value, value::RawValue};

use super::input::fit;

/// What the handlers need to know of every event.
pub(crate) trait Delivered: Event {
    /// `owner/name`.
    fn repository(&self) -> Option<&str>;

    /// The login of who caused it.
    fn sender(&self) -> Option<&str>;

    /// A line for people, by which they find the event again.
    fn subject(&self) -> String;

    /// What it adds to the statistics of its repository.
    fn counts(&self) -> Counts {
        Counts::default()
    }
}

/// What is counted of a repository, besides its deliveries.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) issues_opened: i64,
    pub(crate) pull_requests_merged: i64,
    pub(crate) comments: i64,
    pub(crate) commits: i64,
    pub(crate) releases: i64,
    /// Given minus taken away.
    pub(crate) stars: i64,
    pub(crate) forks: i64,
    pub(crate) failures: i64,
}

/// Calls a macro with every name that has a type of its own, and that type.
macro_rules! with_known_events {
    ($callback:ident) => {
        $callback! {
            issues: Issues,
            issue_comment: IssueComment,
            pull_request: PullRequest,
            pull_request_review: PullRequestReview,
            push: Push,
            release: Release,
            star: Star,
            fork: Fork,
            check_run: CheckRun,
            workflow_run: WorkflowRun,
        }
    };
}
pub(crate) use with_known_events;

macro_rules! define_webhook {
    ($($name:ident: $event:ident,)*) => {
        /// Any of the events.
        #[derive(Debug)]
        pub(crate) enum Webhook {
            $($event($event),)*
            Other(Other),
        }

        impl Webhook {
            /// The payload of an event that has a type of its own; `None` for other names.
            pub(crate) fn known(name: &str, payload: &RawValue) -> Option<Result<Self, String>> {
                match name {
                    $(stringify!($name) => Some(fit(payload).map(Self::$event)),)*
                    _ => None,
                }
            }

            pub(crate) fn emission<'a>(&self, client: &'a Client) -> Emission<'a> {
                match self {
                    $(Self::$event(event) => client.emit(event),)*
                    Self::Other(event) => client.emit(event),
                }
            }
        }
    };
}
with_known_events!(define_webhook);

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Repository {
    full_name: String,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct User {
    login: String,
}

/// Repository and sender stand at the same place in every type.
macro_rules! common_fields {
    () => {
        fn repository(&self) -> Option<&str> {
            self.repository
                .as_ref()
                .map(|repository| repository.full_name.as_str())
        }

        fn sender(&self) -> Option<&str> {
            self.sender.as_ref().map(|sender| sender.login.as_str())
        }
    };
}

/// Something happened to an issue.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.issues")]
pub(crate) struct Issues {
    action: String,
    issue: Issue,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Issue {
    number: i64,
    title: String,
    state: Option<String>,
    user: Option<User>,
}

impl Delivered for Issues {
    common_fields!();

    fn subject(&self) -> String {
        format!(
            "issue #{} {}: {}",
            self.issue.number, self.action, self.issue.title
        )
    }

    fn counts(&self) -> Counts {
        Counts {
            issues_opened: i64::from(self.action == "opened"),
            ..Counts::default()
        }
    }
}

/// Somebody commented on an issue or a pull request.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.issue_comment")]
pub(crate) struct IssueComment {
    action: String,
    issue: Issue,
    comment: Comment,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Comment {
    id: i64,
    body: Option<String>,
    user: Option<User>,
}

impl Delivered for IssueComment {
    common_fields!();

    fn subject(&self) -> String {
        let body = self.comment.body.as_deref().unwrap_or_default();
        format!("comment on #{} {}: {body}", self.issue.number, self.action)
    }

    fn counts(&self) -> Counts {
        Counts {
            comments: i64::from(self.action == "created"),
            ..Counts::default()
        }
    }
}

/// Something happened to a pull request.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.pull_request")]
pub(crate) struct PullRequest {
    action: String,
    pull_request: Pull,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Pull {
    number: i64,
    title: String,
    state: Option<String>,
    draft: Option<bool>,
    /// Left out where a pull request is only mentioned.
    merged: Option<bool>,
    user: Option<User>,
}

impl Delivered for PullRequest {
    common_fields!();

    fn subject(&self) -> String {
        format!(
            "pull request #{} {}: {}",
            self.pull_request.number, self.action, self.pull_request.title
        )
    }

    fn counts(&self) -> Counts {
        let merged = self.action == "closed" && self.pull_request.merged == Some(true);
        Counts {
            pull_requests_merged: i64::from(merged),
            ..Counts::default()
        }
    }
}

/// Somebody reviewed a pull request.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.pull_request_review")]
pub(crate) struct PullRequestReview {
    action: String,
    review: Review,
    pull_request: Pull,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Review {
    id: i64,
    state: String,
    body: Option<String>,
    user: Option<User>,
}

impl Delivered for PullRequestReview {
    common_fields!();

    fn subject(&self) -> String {
        let Self {
            review,
            pull_request,
            ..
        } = self;
        let body = review.body.as_deref().unwrap_or_default();
        format!(
            "review of #{} {}, {}: {body}",
            pull_request.number, self.action, review.state
        )
    }

    fn counts(&self) -> Counts {
        Counts {
            comments: i64::from(self.action == "submitted"),
            ..Counts::default()
        }
    }
}

/// A branch or tag moved.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.push")]
pub(crate) struct Push {
    #[serde(rename = "ref")]
    reference: String,
    before: String,
    after: String,
    forced: Option<bool>,
    commits: Option<Vec<Commit>>,
    repository: Option<Repository>,
    /// Nobody, if a deploy key pushed.
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Commit {
    id: String,
    message: String,
}

impl Push {
    fn commits(&self) -> &[Commit] {
        self.commits.as_deref().unwrap_or_default()
    }
}

impl Delivered for Push {
    common_fields!();

    fn subject(&self) -> String {
        let messages: Vec<&str> = self
            .commits()
            .iter()
            .map(|commit| commit.message.as_str())
            .collect();
        format!("push to {}: {}", self.reference, messages.join(", "))
    }

    fn counts(&self) -> Counts {
        let commits = i64::try_from(self.commits().len()).unwrap_or(i64::MAX);
        Counts {
            commits,
            ..Counts::default()
        }
    }
}

/// Something happened to a release.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.release")]
pub(crate) struct Release {
    action: String,
    release: Version,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Version {
    tag_name: String,
    name: Option<String>,
    draft: Option<bool>,
    prerelease: Option<bool>,
    author: Option<User>,
}

impl Delivered for Release {
    common_fields!();

    fn subject(&self) -> String {
        let Version { tag_name, name, .. } = &self.release;
        format!(
            "release {tag_name} {}: {}",
            self.action,
            name.as_deref().unwrap_or_default()
        )
    }

    fn counts(&self) -> Counts {
        Counts {
            releases: i64::from(self.action == "published"),
            ..Counts::default()
        }
    }
}

/// Somebody gave a star, or took it away.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.star")]
pub(crate) struct Star {
    action: String,
    starred_at: Option<String>,
    repository: Option<Repository>,
    sender: Option<User>,
}

impl Delivered for Star {
    common_fields!();

    fn subject(&self) -> String {
        format!("star {}", self.action)
    }

    fn counts(&self) -> Counts {
        let stars = match self.action.as_str() {
            "created" => 1,
            "deleted" => -1,
            _ => 0,
        };
        Counts {
            stars,
            ..Counts::default()
        }
    }
}

/// Somebody made a fork.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.fork")]
pub(crate) struct Fork {
    forkee: Repository,
    repository: Option<Repository>,
    sender: Option<User>,
}

impl Delivered for Fork {
    common_fields!();

    fn subject(&self) -> String {
        format!("forked to {}", self.forkee.full_name)
    }

    fn counts(&self) -> Counts {
        Counts {
            forks: 1,
            ..Counts::default()
        }
    }
}

/// A check of a commit went on.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.check_run")]
pub(crate) struct CheckRun {
    action: String,
    check_run: Check,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Check {
    id: i64,
    name: String,
    head_sha: String,
    status: Option<String>,
    /// How it ended.
    conclusion: Option<String>,
}

impl Delivered for CheckRun {
    common_fields!();

    fn subject(&self) -> String {
        format!(
            "check {} {}{}",
            self.check_run.name,
            self.action,
            ending(self.check_run.conclusion.as_ref())
        )
    }

    fn counts(&self) -> Counts {
        failures(&self.action, self.check_run.conclusion.as_ref())
    }
}

/// A run of a workflow went on.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.workflow_run")]
pub(crate) struct WorkflowRun {
    action: String,
    workflow_run: Run,
    repository: Option<Repository>,
    sender: Option<User>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Run {
    id: i64,
    run_number: i64,
    name: Option<String>,
    head_branch: Option<String>,
    status: Option<String>,
    /// How it ended.
    conclusion: Option<String>,
}

impl Delivered for WorkflowRun {
    common_fields!();

    fn subject(&self) -> String {
        let Run {
            name,
            run_number,
            conclusion,
            ..
        } = &self.workflow_run;
        let name = name.as_deref().unwrap_or_default();
        format!(
            "run {run_number} of {name} {}{}",
            self.action,
            ending(conclusion.as_ref())
        )
    }

    fn counts(&self) -> Counts {
        failures(&self.action, self.workflow_run.conclusion.as_ref())
    }
}

fn ending(conclusion: Option<&String>) -> String {
    conclusion
        .map(|conclusion| format!(": {conclusion}"))
        .unwrap_or_default()
}

fn failures(action: &str, conclusion: Option<&String>) -> Counts {
    let failed = action == "completed" && conclusion.is_some_and(|ending| ending == "failure");
    Counts {
        failures: i64::from(failed),
        ..Counts::default()
    }
}

/// A delivery of any other name, whole. One Rust type has one event type, so the name that GitHub
/// gave it stands inside. Nothing of the payload is expected to be there.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "github.other")]
pub(crate) struct Other {
    event: String,
    payload: Map<String, Value>,
}

impl Other {
    fn text(&self, object: &str, field: &str) -> Option<&str> {
        self.payload.get(object)?.get(field)?.as_str()
    }
}

impl Delivered for Other {
    fn repository(&self) -> Option<&str> {
        self.text("repository", "full_name")
    }

    fn sender(&self) -> Option<&str> {
        self.text("sender", "login")
    }

    fn subject(&self) -> String {
        let action = self
            .payload
            .get("action")
            .and_then(Value::as_str)
            .unwrap_or_default();
        format!("{} {action}", self.event)
    }
}
