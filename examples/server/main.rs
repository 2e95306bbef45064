//! The original nexus-core's server: takes events over HTTP, and shows what became of them. The example `worker` handles
//! them.
//!
//! ```sh
//! cargo run --example server
//! curl localhost:3000/events --json '{"eventType": "demo.event", "payload": {"hello": "world"}}'
//! curl localhost:3000/health
//! curl localhost:3000/metrics -H 'Accept: application/json'
//! open http://localhost:3000/docs
//! ```
//!
//! `example.env` beside the folders of both lists the variables. PORT is 3000 if it is not set; all addresses of the
//! machine are served, but without a token only requests of the machine itself: `nexus tokens create` makes one. Types
//! that nobody has declared are accepted, as the original did.

use std::net::{Ipv4Addr, SocketAddr};

use axum::{Router, response::Redirect, routing::get};
use nexus_examples::{app, prepare, signalled, variable_of};
use nexus_http::Settings;
use tokio::net::TcpListener;

fn main() -> nexus::Result {
    prepare()?;
    serve()
}

#[tokio::main]
async fn serve() -> nexus::Result {
    let port = match variable_of("PORT") {
        None => 3000,
        Some(port) => port
            .parse::<u16>()
            .map_err(|_| format!("PORT is `{port}`, expected a number from 0 to 65535"))?,
    };
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await;
    let listener = listener.map_err(|error| format!("cannot listen on port {port}: {error}"))?;
    let handle = nexus::start(app("server")).await?;
    tracing::info!(
        node = handle.node_id(),
        "listening on {}",
        listener.local_addr()?
    );

    let nexus = nexus_http::router(
        handle.client().clone(),
        Settings::new()
            .allow_unknown_types()
            .metrics_of(handle.node_metrics()),
    );
    let router = Router::new()
        .route("/", get(async || Redirect::to("/docs")))
        .merge(nexus);
    let fenced = handle.fenced();
    let stopped = async {
        tokio::select! {
            signalled = signalled() => signalled.expect("signals can be listened to"),
            () = fenced => tracing::error!("another process has started with this CORE_NODE_ID"),
        }
    };
    let served = axum::serve(
        listener,
        router.into_make_service_with_connect_info::<SocketAddr>(),
    )
    .with_graceful_shutdown(stopped)
    .await;
    handle.shutdown().await;
    Ok(served?)
}
