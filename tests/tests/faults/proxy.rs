//! A line to the database that can be cut.

use nexus::testing::TestDatabase;
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

/// Passes connections on to the test's server until it is told to fall silent or to refuse.
pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) state: watch::Sender<Line>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    Up,
    /// Connections stay open and nothing comes through.
    Silent,
    /// Connections that are there fall silent for good; new ones are passed on.
    Hole,
    /// Connections are broken and refused.
    Down,
}

impl Proxy {
    pub(crate) async fn new(database: &TestDatabase) -> Self {
        let target: sqlx::postgres::PgConnectOptions = database.url().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (_, rest) = database.url().split_once("://").expect("it is a URL");
        let (account, _) = rest.split_once('@').expect("the URL names a user");
        let name = target.get_database().expect("the URL names a database");
        let url = format!("postgres://{account}@127.0.0.1:{port}/{name}?sslmode=disable");
        let (state, watched) = watch::channel(Line::Up);
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                tokio::spawn(pass_on(from, target.clone(), watched.clone()));
            }
        });
        Self { url, state }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn pass_on(
    mut from: TcpStream,
    target: sqlx::postgres::PgConnectOptions,
    mut line: watch::Receiver<Line>,
) {
    let mut state = *line.borrow_and_update();
    while state == Line::Silent {
        // Held open until something changes.
        if line.changed().await.is_err() {
            return;
        }
        state = *line.borrow_and_update();
    }
    if state == Line::Down {
        return;
    }
    let changed = async {
        let _ = line.changed().await;
        *line.borrow_and_update()
    };
    let mut to: Box<dyn Stream> = if let Some(folder) = target.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", target.get_port()));
        Box::new(UnixStream::connect(path).await.unwrap())
    } else {
        let address = (target.get_host(), target.get_port());
        Box::new(TcpStream::connect(address).await.unwrap())
    };
    let state = tokio::select! {
        _ = copy_bidirectional(&mut from, &mut to) => return,
        state = changed => state,
    };
    match state {
        // Both ends stay open, and nothing is read any more.
        Line::Silent => drop(line.changed().await),
        Line::Hole => std::future::pending().await,
        Line::Up | Line::Down => {}
    }
}
