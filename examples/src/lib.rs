//! What the examples `server` and `worker` share: they are configured by the environment, and run until a signal.

use std::{env, io::IsTerminal};

use nexus::App;

/// Variables of the original nexus-core that stand for what nexus has not got, and what to do instead.
const GONE: [(&str, &str); 4] = [
    (
        "CORE_ENABLE_WORKERS",
        "every process with handlers works, there is no mode to turn on",
    ),
    (
        "CORE_AUTO_DETECT_WORKERS",
        "nodes find each other through the database",
    ),
    (
        "CORE_WORKER_API_ENDPOINT",
        "workers claim from the database, there is no service between them",
    ),
    ("CORE_WORKER_ID", "a process is named by CORE_NODE_ID"),
];

/// Reads the file `.env` of this folder or of one around it, refuses variables that would do nothing, and sets up the
/// log. To be called before there are threads, as the variables of the file become those of the process.
///
/// # Errors
///
/// The file cannot be read, or a variable has a value that cannot be followed; the text says what to do.
pub fn prepare() -> nexus::Result {
    match dotenvy::dotenv() {
        Ok(_) => {}
        Err(error) if error.not_found() => {}
        // Its text shows the line, which may hold a password.
        Err(dotenvy::Error::LineParse(_, place)) => {
            return Err(format!("a line of .env cannot be read, at its character {place}").into());
        }
        Err(error) => return Err(format!("could not read .env: {error}").into()),
    }
    for (variable, instead) in GONE {
        let value = variable_of(variable).unwrap_or_default();
        if !matches!(value.as_str(), "" | "false" | "0") {
            return Err(format!("{variable} is `{value}`: {instead}; unset it").into());
        }
    }
    let level = variable_of("CORE_LOG_LEVEL").unwrap_or_else(|| "info".to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(&level)
        .map_err(|error| format!("CORE_LOG_LEVEL is `{level}`: {error}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// A variable of the environment, if it is set to something.
#[must_use]
pub fn variable_of(name: &str) -> Option<String> {
    let value = env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

/// An app of this name, whose node is called after it unless `CORE_NODE_ID` says otherwise. Database, namespace, lease,
/// batch and poll interval come from the environment.
pub fn app(name: &str) -> App {
    let app = App::discover().name(name).display_name(name);
    if variable_of("CORE_NODE_ID").is_some() {
        return app;
    }
    let random = uuid::Uuid::new_v4().simple().to_string();
    app.node_id(format!("{name}-{}", &random[..6]))
}

/// Completes at SIGINT or SIGTERM.
///
/// # Errors
///
/// The process cannot listen to signals.
pub async fn signalled() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut interrupt, mut terminate) = (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        );
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
