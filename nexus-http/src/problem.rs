//! What every error looks like: RFC 9457.
//!
//! A problem shows what the caller has sent and what is accepted. What the database said goes to the log.

use std::error::Error;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use nexus::client::{
    EditError, EmitError, OperateError, PayloadError, PayloadProblems, ScheduleError,
    is_unavailable,
};
use serde::Serialize;
use utoipa::ToSchema;

/// How long to stay away while the database is, in seconds.
const RETRY_SECONDS: u64 = 5;

/// Why a request was not carried out.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    kind: Kind,
    detail: String,
    misfits: Vec<Misfit>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Why a request was not carried out, as RFC 9457 has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem, example = json!({
    "type": "urn:nexus:problem:payload",
    "title": "The payload does not fit its event type",
    "status": 422,
    "detail": "the payload does not fit event type `order.paid` version 1: at `amount`: want number, but got string",
    "error": "the payload does not fit event type `order.paid` version 1: at `amount`: want number, but got string",
    "errors": [{ "path": "amount", "problem": "want number, but got string" }]
}))]
pub(crate) struct ProblemDocument<'a> {
    /// What kind of problem it is; stays the same from release to release.
    #[serde(rename = "type")]
    #[schema(format = "uri")]
    kind: String,
    /// The kind in words.
    title: &'static str,
    /// The status of the answer.
    status: u16,
    /// What it is this time.
    detail: &'a str,
    /// The same as `detail`, where clients of the original server look for it.
    error: &'a str,
    /// Where the payload does not fit its schema.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    #[schema(required = false)]
    errors: &'a [Misfit],
}

/// A place where a payload does not fit its schema.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Misfit {
    /// The place, such as `lines[2].amount`; empty for the payload itself. In a batch, the number of the event
    /// comes first: `[3] lines[2].amount`.
    path: String,
    /// What is wrong there.
    problem: String,
}

/// The kinds of problems. Their names are promised by `docs/http.md`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// The request cannot be understood.
    Request,
    /// No token, or one that is not in force here.
    Unauthenticated,
    /// The token has not got the scope.
    Scope,
    /// What is asked for is not there.
    NotFound,
    MethodNotAllowed,
    /// The caller accepts nothing that is offered.
    NotAcceptable,
    /// It is there, but in a state in which this cannot be done.
    Conflict,
    TooLarge,
    MediaType,
    UnknownEventType,
    Payload,
    IdempotencyKey,
    /// It is understood, and cannot be done as it was said.
    Invalid,
    RateLimit,
    Database,
    Timeout,
    Internal,
}

impl Kind {
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Request => (
                StatusCode::BAD_REQUEST,
                "request",
                "The request cannot be understood",
            ),
            Self::Unauthenticated => (
                StatusCode::UNAUTHORIZED,
                "unauthenticated",
                "A token is needed",
            ),
            Self::Scope => (
                StatusCode::FORBIDDEN,
                "scope",
                "The token does not allow this",
            ),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "It is not there"),
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                "method",
                "This cannot be done here",
            ),
            Self::NotAcceptable => (
                StatusCode::NOT_ACCEPTABLE,
                "not-acceptable",
                "It is not there in a form that you accept",
            ),
            Self::Conflict => (
                StatusCode::CONFLICT,
                "conflict",
                "It cannot be done as things are",
            ),
            Self::TooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-large",
                "It is too large",
            ),
            Self::MediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "media-type",
                "The content type is not known here",
            ),
            Self::UnknownEventType => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "unknown-event-type",
                "No app has declared the event type",
            ),
            Self::Payload => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "payload",
                "The payload does not fit its event type",
            ),
            Self::IdempotencyKey => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key",
                "The idempotency key was used for another event",
            ),
            Self::Invalid => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid",
                "It cannot be done as it was said",
            ),
            Self::RateLimit => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate-limit",
                "The token makes too many requests",
            ),
            Self::Database => (
                StatusCode::SERVICE_UNAVAILABLE,
                "database",
                "The database is away",
            ),
            Self::Timeout => (
                StatusCode::SERVICE_UNAVAILABLE,
                "timeout",
                "It took too long",
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "The server has failed",
            ),
        }
    }
}

impl Problem {
    pub(crate) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        let problem = Self {
            kind,
            detail: detail.into(),
            misfits: Vec::new(),
            headers: Vec::new(),
        };
        match kind {
            Kind::Database | Kind::Timeout => problem.retry_after(RETRY_SECONDS),
            _ => problem,
        }
    }

    pub(crate) fn retry_after(self, seconds: u64) -> Self {
        self.header(header::RETRY_AFTER, HeaderValue::from(seconds))
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Says of a problem in a batch which event it is about, counted from 0.
    pub(crate) fn of_event(mut self, index: usize) -> Self {
        self.detail = format!("event {index}: {}", self.detail);
        for misfit in &mut self.misfits {
            misfit.path = format!("[{index}] {}", misfit.path);
        }
        self
    }

    fn misfit(detail: String, problems: &PayloadProblems) -> Self {
        let misfits = problems.iter().map(|problem| Misfit {
            path: problem.path.clone(),
            problem: problem.problem.clone(),
        });
        Self {
            misfits: misfits.collect(),
            ..Self::new(Kind::Payload, detail)
        }
    }

    /// The database is away, or it has refused what it should not have.
    fn of_database(error: &(dyn Error + 'static)) -> Self {
        let chain = chain(error);
        if is_unavailable(error) {
            tracing::warn!(error = chain, "the database could not be asked");
            return Self::new(Kind::Database, "the database cannot be asked at the moment");
        }
        tracing::error!(error = chain, "the database refused a request");
        Self::new(
            Kind::Internal,
            "the database refused the request; the server's log says why",
        )
    }
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, name, title) = self.kind.parts();
        let document = ProblemDocument {
            kind: format!("urn:nexus:problem:{name}"),
            title,
            status: status.as_u16(),
            detail: &self.detail,
            error: &self.detail,
            errors: &self.misfits,
        };
        let mut response = (status, Json(document)).into_response();
        let is = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, is);
        response.headers_mut().extend(self.headers);
        response
    }
}

/// For a route that is there, but not with this method.
pub(crate) async fn method_not_allowed(method: Method) -> Problem {
    Problem::new(
        Kind::MethodNotAllowed,
        format!("{method} is not among the methods in the header `Allow`"),
    )
}

impl From<OperateError> for Problem {
    fn from(error: OperateError) -> Self {
        match &error {
            // What cannot be called so is not there either.
            OperateError::Name(_) | OperateError::UnknownGroup { .. } => {
                Self::new(Kind::NotFound, error.to_string())
            }
            OperateError::Rate { .. } => Self::new(Kind::Invalid, error.to_string()),
            // Says how much is done, and that the same request does the rest.
            OperateError::Interrupted { .. } => {
                let problem = Self::of_database(&error);
                Self {
                    detail: error.to_string(),
                    ..problem
                }
            }
            _ => Self::of_database(&error),
        }
    }
}

impl From<PayloadError> for Problem {
    fn from(error: PayloadError) -> Self {
        match error {
            PayloadError::UnknownType { .. } | PayloadError::UnknownVersion { .. } => {
                Self::new(Kind::UnknownEventType, error.to_string())
            }
            PayloadError::Misfit { ref problems, .. } => Self::misfit(error.to_string(), problems),
            PayloadError::Encode(error) => error.into(),
            PayloadError::Operate(error) => error.into(),
            error => Self::new(Kind::Invalid, error.to_string()),
        }
    }
}

impl From<nexus::event::EncodeError> for Problem {
    fn from(error: nexus::event::EncodeError) -> Self {
        let kind = match error {
            nexus::event::EncodeError::TooLarge { .. } => Kind::TooLarge,
            _ => Kind::Invalid,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<EmitError> for Problem {
    fn from(error: EmitError) -> Self {
        match error {
            EmitError::Encode(error) => error.into(),
            EmitError::KeyUsedForAnotherEvent { .. } => {
                Self::new(Kind::IdempotencyKey, error.to_string())
            }
            EmitError::Unknown(_) => {
                tracing::warn!(error = chain(&error), "an event's fate is unknown");
                Self::new(Kind::Database, error.to_string())
            }
            error => Self::of_database(&error),
        }
    }
}

impl From<EditError> for Problem {
    fn from(error: EditError) -> Self {
        match error {
            EditError::Operate(error) => error.into(),
            EditError::Encode(error) => error.into(),
            EditError::NoSuchLetter { .. } => Self::new(Kind::NotFound, error.to_string()),
            EditError::Misfit { ref problems, .. } => Self::misfit(error.to_string(), problems),
            error => Self::new(Kind::Conflict, error.to_string()),
        }
    }
}

impl From<ScheduleError> for Problem {
    fn from(error: ScheduleError) -> Self {
        match error {
            ScheduleError::Unknown { .. } => Self::new(Kind::NotFound, error.to_string()),
            ScheduleError::Inactive { .. } => Self::new(Kind::Conflict, error.to_string()),
            ScheduleError::Database { .. } => Self::of_database(&error),
            error => Self::new(Kind::Invalid, error.to_string()),
        }
    }
}
