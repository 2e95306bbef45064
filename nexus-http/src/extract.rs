//! What is taken out of requests, with problems for what cannot be; and what holds for every request.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{
        FromRequest, FromRequestParts, Request, State,
        rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection},
    },
    http::{HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use crate::problem::{Kind, Problem};

/// Words of the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(crate) struct Path<T>(pub(crate) T);

/// Parameters behind the question mark.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(crate) struct Query<T>(pub(crate) T);

/// A body of JSON.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(Problem))]
pub(crate) struct Json<T>(pub(crate) T);

/// A body as it comes.
pub(crate) struct Body(pub(crate) Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        Ok(Self(Bytes::from_request(request, state).await?))
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(Kind::Request, rejection.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(Kind::Request, rejection.body_text())
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        of_body(rejection.status(), rejection.body_text())
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        of_body(rejection.status(), rejection.body_text())
    }
}

fn of_body(status: StatusCode, text: String) -> Problem {
    let kind = match status {
        StatusCode::PAYLOAD_TOO_LARGE => Kind::TooLarge,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Kind::MediaType,
        StatusCode::UNPROCESSABLE_ENTITY => Kind::Invalid,
        _ => Kind::Request,
    };
    Problem::new(kind, text)
}

/// Bounds the time of a request, refuses what no text of the database can be, and keeps answers out of caches.
pub(crate) async fn guard(
    State(timeout): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    let is_nul = |text: &str| text.contains("%00");
    let mut response = if is_nul(request.uri().path()) || request.uri().query().is_some_and(is_nul)
    {
        Problem::new(
            Kind::Request,
            "the address holds the character U+0000, which is in no name",
        )
        .into_response()
    } else {
        let answer = tokio::time::timeout(timeout, next.run(request)).await;
        answer.unwrap_or_else(|_| {
            Problem::new(
                Kind::Timeout,
                format!(
                    "no answer within {timeout:?}: it may have been done all the same, so repeat an event only with the \
                     idempotency key that it had"
                ),
            )
            .into_response()
        })
    };
    let headers = response.headers_mut();
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}
