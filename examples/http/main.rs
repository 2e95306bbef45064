//! A shop of one process: its own pages, its handlers, and nexus over HTTP beside them.
//!
//! ```sh
//! cargo run --example http
//! curl localhost:3000/nexus/events --json '{"eventType": "order.paid", "payload": {"order": 7, "amount": 12.5}}'
//! open http://localhost:3000/nexus/docs
//! ```
//!
//! PORT is 3000 if it is not set. Only this machine is served, which needs no token while there is none. With
//! `-- --token` a token is made, which is printed and works for an hour; until then nobody is served without it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{Json, Router, extract, routing::get};
use nexus::{client::Scope, prelude::*};
use nexus_http::Settings;
use tokio::{net::TcpListener, signal};

/// An order was paid.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid", key = order)]
struct OrderPaid {
    order: u32,
    amount: f64,
}

/// Whatever costs more than it should ends as a dead letter: see `GET /nexus/dead-letters`.
#[handler(group = "books")]
async fn book(paid: OrderPaid) -> nexus::Result {
    if paid.amount > 1_000_000.0 {
        return Err(Error::permanent("nobody pays that much"));
    }
    println!("order {} is booked", paid.order);
    Ok(())
}

/// See `GET /nexus/schedules`.
#[cron("0 3 * * *")]
async fn close_the_day() -> nexus::Result {
    Ok(())
}

/// A page of the shop's own.
async fn orders(extract::State(client): extract::State<Client>) -> Json<Vec<serde_json::Value>> {
    let paid = client.events().event_type("order.paid").list(20).await;
    let paid = paid.unwrap_or_default().into_iter();
    Json(paid.map(|event| event.payload).collect())
}

#[tokio::main]
async fn main() -> nexus::Result {
    let handle = nexus::start(App::discover().namespace("http")).await?;
    let client = handle.client().clone();
    if std::env::args().any(|argument| argument == "--token") {
        let hour = Duration::from_hours(1);
        let all = [Scope::Emit, Scope::Read, Scope::Operate];
        let created = client.create_token("example", &all, Some(hour)).await?;
        println!("{}", created.text);
    }
    let settings = Settings::new().metrics_of(handle.node_metrics());
    let app = Router::new()
        .route("/orders", get(orders))
        .with_state(client.clone())
        .nest("/nexus", nexus_http::router(client, settings));

    let port = std::env::var("PORT").map_or(Ok(3000), |port| port.parse())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    println!("http://{}/nexus/docs", listener.local_addr()?);
    // With the address of the caller: without it, nobody is served without a token.
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    let stopped = async {
        let _ = signal::ctrl_c().await;
    };
    axum::serve(listener, app)
        .with_graceful_shutdown(stopped)
        .await?;
    handle.shutdown().await;
    Ok(())
}
