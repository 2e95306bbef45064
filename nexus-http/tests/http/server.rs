//! A server for a test, and the apps that it serves.

use std::net::SocketAddr;

use axum::{Extension, Router, extract::ConnectInfo};
use nexus::{
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_http::Settings;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use sqlx::postgres::PgConnectOptions;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// An order was paid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid", key = order)]
pub(crate) struct OrderPaid {
    pub(crate) order: u32,
    pub(crate) amount: f64,
}

/// A parcel left.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.sent", version = 2)]
pub(crate) struct ParcelSent {
    pub(crate) order: u32,
}

/// Sends the parcel of an order.
#[handler(group = "parcels")]
pub(crate) async fn send(paid: OrderPaid) -> Emit<ParcelSent> {
    Emit(ParcelSent { order: paid.order })
}

/// Refuses every order below 1000.
#[handler(group = "books")]
pub(crate) async fn book(paid: OrderPaid) -> nexus::Result {
    match paid.order {
        1_000.. => Ok(()),
        _ => Err(Error::permanent("the books are closed")),
    }
}

/// Once a year.
#[cron("0 0 1 1 *")]
pub(crate) async fn count_stock() -> nexus::Result {
    Ok(())
}

pub(crate) fn app() -> App {
    App::discover().namespace("shop")
}

/// An app whose handlers run, and a server for it.
pub(crate) async fn shop() -> (TestApp, Server) {
    let app = TestApp::start(app()).await;
    let server = Server::start(app.client(), Settings::new()).await;
    (app, server)
}

/// A router behind a socket of this machine.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    http: reqwest::Client,
    token: Option<String>,
}

/// A client of HTTP. Built with other crates of the workspace, reqwest wants to be told who does TLS, which nothing here
/// needs.
pub(crate) fn http() -> reqwest::Client {
    // It may have been said before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

impl Server {
    pub(crate) async fn start(client: &Client, settings: Settings) -> Self {
        Self::serve(nexus_http::router(client.clone(), settings)).await
    }

    /// A server that believes all its callers to be on another machine.
    pub(crate) async fn start_for_others(client: &Client, settings: Settings) -> Self {
        let elsewhere: SocketAddr = ([192, 0, 2, 7], 4711).into();
        let router = nexus_http::router(client.clone(), settings);
        Self::serve(router.layer(Extension(ConnectInfo(elsewhere)))).await
    }

    pub(crate) async fn serve(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, service).await });
        Self {
            address,
            http: http(),
            token: None,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same server for a program with this token.
    pub(crate) fn with_token(&self, token: &str) -> Self {
        Self {
            address: self.address,
            http: self.http.clone(),
            token: Some(token.to_owned()),
        }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self
            .http
            .request(method, format!("http://{}{path}", self.address));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        answer(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        answer(self.request(Method::POST, path).json(body)).await
    }

    /// A body of any kind to `POST /events`.
    pub(crate) async fn emit(&self, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.request(Method::POST, "/events");
        answer(request.header("content-type", content_type).body(body)).await
    }
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) text: String,
}

pub(crate) async fn answer(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    Answer {
        status: response.status(),
        headers: response.headers().clone(),
        text: response.text().await.unwrap(),
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// The document, if all went well.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{self:#?}");
        serde_json::from_str(&self.text).unwrap()
    }

    /// The problem, if it has this status and kind.
    #[track_caller]
    pub(crate) fn problem(&self, status: u16, kind: &str) -> Value {
        assert_eq!(self.status, status, "{self:#?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem: Value = serde_json::from_str(&self.text).unwrap();
        assert_eq!(
            problem["type"],
            format!("urn:nexus:problem:{kind}"),
            "{problem}"
        );
        assert_eq!(problem["status"], status);
        assert_eq!(problem["error"], problem["detail"]);
        problem
    }
}

/// A line to the database that can be cut.
pub(crate) struct Proxy {
    pub(crate) url: String,
    is_up: watch::Sender<bool>,
}

impl Proxy {
    pub(crate) async fn start(database: &TestDatabase) -> Self {
        let target: PgConnectOptions = database.url().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (_, rest) = database.url().split_once("://").unwrap();
        let (account, _) = rest.split_once('@').unwrap();
        let name = target.get_database().unwrap();
        let url = format!("postgres://{account}@127.0.0.1:{port}/{name}?sslmode=disable");
        let (is_up, watched) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                tokio::spawn(pass_on(from, target.clone(), watched.clone()));
            }
        });
        Self { url, is_up }
    }

    /// Breaks every connection, and refuses new ones.
    pub(crate) fn cut(&self) {
        self.is_up.send_replace(false);
    }

    pub(crate) fn mend(&self) {
        self.is_up.send_replace(true);
    }
}

async fn pass_on(mut from: TcpStream, target: PgConnectOptions, mut is_up: watch::Receiver<bool>) {
    if !*is_up.borrow_and_update() {
        return;
    }
    if let Some(folder) = target.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", target.get_port()));
        let mut to = UnixStream::connect(path).await.unwrap();
        tokio::select! {
            _ = copy_bidirectional(&mut from, &mut to) => {}
            _ = is_up.changed() => {}
        }
    } else {
        let address = (target.get_host(), target.get_port());
        let mut to = TcpStream::connect(address).await.unwrap();
        tokio::select! {
            _ = copy_bidirectional(&mut from, &mut to) => {}
            _ = is_up.changed() => {}
        }
    }
}
