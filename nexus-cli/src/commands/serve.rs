//! `nexus serve`

use std::{
    fmt,
    future::IntoFuture as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    str::FromStr,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use nexus::{Client, client::ConnectError};
use serde_json::json;
use tokio::{net::TcpListener, sync::oneshot};

use crate::{
    Global,
    console::{Console, DIM, WARN, safe},
    failure::usage,
    moments::{duration, short},
    session::{Missing, Place, Settings, explain},
};

#[derive(Debug, Args)]
#[command(after_help = "\
Every option is taken from its variable if it is not given. Stops at Ctrl-C or SIGTERM: requests that are under way end \
first, a second signal does not wait for them. There is no TLS: put a proxy before it.

Example: nexus serve --namespace shop --listen 0.0.0.0 --port 8080")]
pub(crate) struct Serve {
    /// The port, 3000 by default; 0 takes one that is free [PORT]
    #[arg(long)]
    port: Option<u16>,
    /// The address, 127.0.0.1 by default; callers from elsewhere need a token [`CORE_HTTP_LISTEN`]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<IpAddr>,
    /// Take events of types that no app has declared, without a check [`CORE_HTTP_ALLOW_UNKNOWN_TYPES`]
    #[arg(long)]
    allow_unknown_types: bool,
    /// The most bytes of a request's body, 2097152 by default [`CORE_HTTP_BODY_BYTES`]
    #[arg(long, value_name = "BYTES")]
    body_bytes: Option<usize>,
    /// The most events of a batch, 100 by default [`CORE_HTTP_BATCH_EVENTS`]
    #[arg(long, value_name = "NUMBER")]
    batch_events: Option<usize>,
    /// After this a request is given up, 30s by default [`CORE_HTTP_TIMEOUT`]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    /// How many requests a second each token may make, 200 by default [`CORE_HTTP_REQUESTS_PER_SECOND`]
    #[arg(long, value_name = "NUMBER")]
    requests_per_second: Option<NonZeroU32>,
    /// The most connections to the database, 10 by default [`CORE_HTTP_POOL_SIZE`]
    #[arg(long, value_name = "NUMBER")]
    pool_size: Option<u32>,
    /// How long requests may take to end once it stops, 30s by default [`CORE_HTTP_SHUTDOWN_TIMEOUT`]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    shutdown_timeout: Option<Duration>,
}

impl Serve {
    pub(crate) async fn run(self, global: &Global, console: &Console) -> anyhow::Result<()> {
        let settings = Settings::read()?;
        let port = settings.or(self.port, "PORT", parse)?.unwrap_or(3000);
        let listen = settings.or(self.listen, "CORE_HTTP_LISTEN", parse)?;
        let address = SocketAddr::new(listen.unwrap_or(Ipv4Addr::LOCALHOST.into()), port);
        let pool_size = settings.or(self.pool_size, "CORE_HTTP_POOL_SIZE", parse)?;
        let patience = settings
            .or(
                self.shutdown_timeout,
                "CORE_HTTP_SHUTDOWN_TIMEOUT",
                duration,
            )?
            .unwrap_or(Duration::from_secs(30));
        let behaviour = self.behaviour(&settings)?;

        let place = Place::find(global, Missing::IsAnError).await?;
        let client = connect(&place, pool_size.unwrap_or(10)).await?;
        let has_tokens = client.has_tokens().await?;
        let mut signals = Signals::new()?;
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("could not listen on {address}; --port and --listen name another address")
        })?;
        let address = listener.local_addr()?;
        let router = nexus_http::router(client, behaviour);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = axum::serve(
            listener,
            router.into_make_service_with_connect_info::<SocketAddr>(),
        )
        .with_graceful_shutdown(async {
            // Dropped without a word means the same.
            let _ = stopped.await;
        })
        .into_future();
        tell_start(&place, address, console)?;
        if !has_tokens {
            warn_of_no_tokens(address, console);
        }

        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => return ended.context("could not go on serving"),
            () = signals.next() => {}
        }
        console.say(&format!(
            "stopping: requests that are under way have {} to end",
            short(patience)
        ));
        drop(stop);
        tokio::select! {
            ended = &mut serving => ended.context("could not stop in an orderly way"),
            () = tokio::time::sleep(patience) => anyhow::bail!(
                "some requests had not ended after {}: what they asked for may be done or not", short(patience)
            ),
            () = signals.next() => anyhow::bail!(
                "stopped at once: what was asked for a moment ago may be done or not"
            ),
        }
    }

    fn behaviour(&self, settings: &Settings) -> anyhow::Result<nexus_http::Settings> {
        let mut behaviour = nexus_http::Settings::new();
        let given = self.allow_unknown_types.then_some(true);
        if settings
            .or(given, "CORE_HTTP_ALLOW_UNKNOWN_TYPES", parse)?
            .unwrap_or(false)
        {
            behaviour = behaviour.allow_unknown_types();
        }
        if let Some(most) = settings.or(self.body_bytes, "CORE_HTTP_BODY_BYTES", parse)? {
            behaviour = behaviour.body_bytes(most);
        }
        if let Some(most) = settings.or(self.batch_events, "CORE_HTTP_BATCH_EVENTS", parse)? {
            behaviour = behaviour.batch_events(most);
        }
        if let Some(most) = settings.or(self.timeout, "CORE_HTTP_TIMEOUT", duration)? {
            if most.is_zero() {
                return Err(usage("a timeout of zero would give every request up"));
            }
            behaviour = behaviour.timeout(most);
        }
        let variable = "CORE_HTTP_REQUESTS_PER_SECOND";
        if let Some(most) = settings.or(self.requests_per_second, variable, parse)? {
            behaviour = behaviour.requests_per_second(most);
        }
        Ok(behaviour)
    }
}

fn parse<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
    text.trim()
        .parse()
        .map_err(|error: T::Err| error.to_string())
}

/// Waits for a database that is coming up, as services are started in any order, and makes a namespace that is
/// not there, as an app does. A role that may only read gets by in one that is.
async fn connect(place: &Place, pool_size: u32) -> anyhow::Result<Client> {
    let database = place
        .database
        .clone()
        .connect_timeout(Duration::from_secs(30))
        .pool_size(pool_size);
    let connected = match Client::attach(&database, &place.namespace).await {
        Err(ConnectError::UnknownNamespace { .. }) => {
            Client::connect(&database, &place.namespace).await
        }
        attached => attached,
    };
    connected.map_err(|error| explain(error, &database))
}

fn tell_start(place: &Place, address: SocketAddr, console: &Console) -> anyhow::Result<()> {
    // Nobody can call the address that stands for all of them.
    let host: IpAddr = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let url = format!("http://{}", SocketAddr::new(host, address.port()));
    let (namespace, target) = (&place.namespace, place.database.target());
    if console.is_json {
        return console.print_json_line(&json!({
            "address": address.to_string(),
            "url": url,
            "namespace": namespace,
            "database": target,
        }));
    }
    console.print(&format!(
        "serving namespace {} of {} on {address}\n{url}/docs is a page to try it\n",
        safe(namespace),
        safe(&target)
    ))
}

fn warn_of_no_tokens(address: SocketAddr, console: &Console) {
    let how = "nexus tokens create NAME --scope emit";
    if address.ip().to_canonical().is_loopback() {
        console.say(&format!(
            "{DIM}the namespace has no token: every program of this machine may do everything, until `{how}`{DIM:#}"
        ));
    } else {
        console.say(&format!(
            "{WARN}the namespace has no token: all callers are refused but those of this machine, until `{how}`{WARN:#}"
        ));
    }
}

/// What asks a service to stop.
struct Signals {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let failed = "could not prepare for signals";
            Ok(Self {
                interrupt: signal(SignalKind::interrupt()).context(failed)?,
                terminate: signal(SignalKind::terminate()).context(failed)?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    }
}
