//! nexus over HTTP: an axum router that emits events, shows what became of them, and steers.
//!
//! ```no_run
//! # async fn example() -> nexus::Result {
//! use std::net::SocketAddr;
//! use nexus::{Client, Database};
//!
//! let database = Database::from_url("postgres://shop@localhost/shop", "the command line")?;
//! let client = Client::connect(&database, "shop").await?;
//! let app = axum::Router::new()
//!     .route("/", axum::routing::get(async || "the shop"))
//!     .nest("/nexus", nexus_http::router(client, nexus_http::Settings::new()));
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
//! // With the address of the caller, so that this machine needs no token while there is none.
//! let app = app.into_make_service_with_connect_info::<SocketAddr>();
//! axum::serve(listener, app).await?;
//! # Ok(())
//! # }
//! ```
//!
//! `GET /docs` is a page to try everything, `GET /openapi.json` its description. `docs/http.md` of the repository
//! has the rest: which routes there are, who may do what, what the errors are called.
//!
//! - [`router`] makes the router, [`Settings`] say how it is to behave.
//! - `emit` takes events, in the original server's form or as CloudEvents (`cloud_events`).
//! - `events`, `dead_letters`, `schedules`, `namespace` show and steer what there is, by [`documents`].
//! - `metrics` has figures for whoever watches the namespace.
//! - `access` decides who may, by tokens ([`nexus::client::Token`]).
//! - `problem` is what every error looks like, `openapi` the description.

#![expect(
    clippy::struct_field_names,
    reason = "documents have the names that docs/cli.md promises"
)]

mod access;
mod cloud_events;
mod dead_letters;
pub mod documents;
mod emit;
mod events;
mod extract;
mod health;
mod metrics;
mod namespace;
mod openapi;
mod problem;
mod schedules;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use axum::{Router, extract::DefaultBodyLimit, middleware};
use nexus::{Client, app::NodeMetrics, client::Scope};
use utoipa_axum::router::OpenApiRouter;

/// How a [`router`] behaves.
#[derive(Debug, Clone)]
#[must_use]
pub struct Settings {
    allow_unknown_types: bool,
    body_bytes: usize,
    batch_events: usize,
    timeout: Duration,
    rate: NonZeroU32,
    node: Option<NodeMetrics>,
}

const RATE: NonZeroU32 = NonZeroU32::new(200).unwrap();

impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}

impl Settings {
    /// The defaults, which each method tells.
    pub fn new() -> Self {
        Self {
            allow_unknown_types: false,
            body_bytes: 2 * 1024 * 1024,
            batch_events: 100,
            timeout: Duration::from_secs(30),
            rate: RATE,
            node: None,
        }
    }

    /// Takes events of types that no app has declared, without a check of their payloads, as the original
    /// server does. Default: they are refused.
    pub fn allow_unknown_types(mut self) -> Self {
        self.allow_unknown_types = true;
        self
    }

    /// The most bytes that the body of a request may have; default 2 MiB. One payload has up to 1 MiB, or what
    /// the client's app allows.
    pub fn body_bytes(mut self, most: usize) -> Self {
        self.body_bytes = most;
        self
    }

    /// The most events of a batch; default 100.
    pub fn batch_events(mut self, most: usize) -> Self {
        self.batch_events = most;
        self
    }

    /// How long a request may take until it is given up; default 30 s. What it was doing then may be done or
    /// not.
    pub fn timeout(mut self, most: Duration) -> Self {
        self.timeout = most;
        self
    }

    /// How many requests a second each token may make, on average and in one burst; default 200. Each process
    /// counts for itself.
    pub fn requests_per_second(mut self, most: NonZeroU32) -> Self {
        self.rate = most;
        self
    }

    /// Lets `GET /metrics` tell of a node as well ([`Handle::node_metrics`](nexus::Handle::node_metrics)): the one that
    /// runs in this process; of the node alone if the figures of the namespace cannot be had. Default: of the namespace
    /// only.
    pub fn metrics_of(mut self, node: NodeMetrics) -> Self {
        self.node = Some(node);
        self
    }
}

/// What every handler works with.
struct Service {
    client: Client,
    settings: Settings,
    limiter: access::Limiter,
    latest: metrics::Latest,
}

type Shared = axum::extract::State<Arc<Service>>;

/// The router for the client's namespace, to be served as it is or [nested](Router::nest) in yours.
///
/// Serve it by [`into_make_service_with_connect_info`](Router::into_make_service_with_connect_info) of
/// [`SocketAddr`](std::net::SocketAddr): only so does it know that a request comes from this machine, and only
/// those are served without a token.
pub fn router(client: Client, settings: Settings) -> Router {
    let (timeout, body_bytes) = (settings.timeout, settings.body_bytes);
    let service = Arc::new(Service {
        limiter: access::Limiter::new(settings.rate),
        latest: metrics::Latest::default(),
        client,
        settings,
    });
    let (routes, description) = routes(&service).split_for_parts();
    routes
        .with_state(service)
        .merge(openapi::router(&description))
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(DefaultBodyLimit::max(body_bytes))
        .layer(middleware::from_fn_with_state(timeout, extract::guard))
}

fn routes(service: &Arc<Service>) -> OpenApiRouter<Arc<Service>> {
    let gated = |scope, routes: OpenApiRouter<Arc<Service>>| {
        let gate = access::Gate {
            service: Arc::clone(service),
            scope,
        };
        routes.route_layer(middleware::from_fn_with_state(gate, access::check))
    };
    let reading = OpenApiRouter::new()
        .merge(events::reading())
        .merge(dead_letters::reading())
        .merge(schedules::reading())
        .merge(namespace::reading())
        .merge(metrics::reading());
    let steering = OpenApiRouter::new()
        .merge(dead_letters::steering())
        .merge(schedules::steering())
        .merge(namespace::steering());
    OpenApiRouter::with_openapi(openapi::base())
        .merge(health::routes())
        .merge(gated(Scope::Emit, emit::routes()))
        .merge(gated(Scope::Read, reading))
        .merge(gated(Scope::Operate, steering))
}
