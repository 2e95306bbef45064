//! The description, and the page to try everything.

use axum::{
    Router,
    http::{HeaderName, HeaderValue, header},
    response::IntoResponse,
    routing::get,
};
use utoipa::{
    IntoResponses, Modify, OpenApi,
    openapi::{
        security::{Http, HttpAuthScheme, SecurityScheme},
        server::Server,
    },
};

use crate::problem::ProblemDocument;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "nexus",
        description = "Typed events on Postgres: emit them, look at what became of them, steer."
    ),
    tags(
        (name = "events", description = "Emit events, and look at the log."),
        (name = "dead letters", description = "Messages that will not be tried again by themselves."),
        (name = "schedules", description = "Cron expressions that emit events."),
        (name = "namespace", description = "Groups, nodes, schemas."),
        (name = "health", description = "Whether the server can work.")
    ),
    security(("token" = [])),
    modifiers(&Finish)
)]
struct Base;

struct Finish;

impl Modify for Finish {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        // Wherever the router is mounted: relative to the address of the description.
        openapi.servers = Some(vec![Server::new(".")]);
        let mut token = Http::new(HttpAuthScheme::Bearer);
        token.description =
            Some("A token of the namespace. This machine needs none while there is none.".into());
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(token));
    }
}

/// What is described of no route.
pub(crate) fn base() -> utoipa::openapi::OpenApi {
    Base::openapi()
}

/// What every route with a token may answer.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the macro alone")]
pub(crate) enum Refusals {
    /// The request cannot be understood.
    #[response(status = 400, content_type = "application/problem+json")]
    Request(#[to_schema] ProblemDocument<'static>),
    /// A token is needed.
    #[response(status = 401, content_type = "application/problem+json",
        headers(("WWW-Authenticate" = String)))]
    Unauthenticated(#[to_schema] ProblemDocument<'static>),
    /// The token does not allow this.
    #[response(status = 403, content_type = "application/problem+json",
        headers(("WWW-Authenticate" = String)))]
    Scope(#[to_schema] ProblemDocument<'static>),
    /// The token makes too many requests.
    #[response(status = 429, content_type = "application/problem+json",
        headers(("Retry-After" = u64)))]
    RateLimit(#[to_schema] ProblemDocument<'static>),
    /// The server has failed.
    #[response(status = 500, content_type = "application/problem+json")]
    Internal(#[to_schema] ProblemDocument<'static>),
    /// The database is away, or it took too long.
    #[response(status = 503, content_type = "application/problem+json",
        headers(("Retry-After" = u64)))]
    Database(#[to_schema] ProblemDocument<'static>),
}

/// What routes for one thing may answer as well.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the macro alone")]
pub(crate) enum Missing {
    /// It is not there.
    #[response(status = 404, content_type = "application/problem+json")]
    NotFound(#[to_schema] ProblemDocument<'static>),
}

/// What routes with a body may answer as well.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the macro alone")]
pub(crate) enum Steering {
    /// The body is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(#[to_schema] ProblemDocument<'static>),
    /// The content type is not JSON.
    #[response(status = 415, content_type = "application/problem+json")]
    MediaType(#[to_schema] ProblemDocument<'static>),
    /// It cannot be done as it was said.
    #[response(status = 422, content_type = "application/problem+json")]
    Invalid(#[to_schema] ProblemDocument<'static>),
}

/// What an emit may answer as well.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the macro alone")]
pub(crate) enum Emitting {
    /// The body, the batch or a payload is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(#[to_schema] ProblemDocument<'static>),
    /// The content type is not known here.
    #[response(status = 415, content_type = "application/problem+json")]
    MediaType(#[to_schema] ProblemDocument<'static>),
    /// No app has declared the event type, the payload does not fit it, or the idempotency key was used for
    /// another event.
    #[response(status = 422, content_type = "application/problem+json")]
    Invalid(#[to_schema] ProblemDocument<'static>),
}

/// Serves the description and the page. Everybody may have them: they say nothing of the namespace.
pub(crate) fn router(description: &utoipa::openapi::OpenApi) -> Router {
    let description = description.to_json().unwrap_or_default();
    Router::new()
        .route(
            "/openapi.json",
            get(move || async move { asset("application/json", description) }),
        )
        .route("/docs", get(async || page()))
        .route(
            "/docs.js",
            get(async || asset("text/javascript; charset=utf-8", include_str!("docs.js"))),
        )
        .route(
            "/docs.css",
            get(async || asset("text/css; charset=utf-8", include_str!("docs.css"))),
        )
}

fn asset(content_type: &'static str, body: impl IntoResponse) -> impl IntoResponse {
    let is = |name: HeaderName, value| (name, HeaderValue::from_static(value));
    (
        [
            is(header::CONTENT_TYPE, content_type),
            is(header::CACHE_CONTROL, "no-cache"),
        ],
        body,
    )
}

fn page() -> impl IntoResponse {
    // Nothing of another host, nothing written into the page, and no frame around it.
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; \
                  form-action 'none'; frame-ancestors 'none'";
    (
        [(header::CONTENT_SECURITY_POLICY, policy)],
        asset("text/html; charset=utf-8", include_str!("docs.html")),
    )
}
