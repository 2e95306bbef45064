//! A line to the database that can be slow, silent or cut, and that acts exactly before or after a commit.
//!
//! The proxy reads along. It knows the statements of each connection, so that it can tell which commit
//! stores a claim, a completion or a tick ([`Point`]), and hold that commit, or its answer, back. The process
//! behind it runs the code that users run: there is nothing in it to help.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{oneshot, watch},
    task::JoinHandle,
};

use crate::cluster::ROLE;

/// What is stored by a commit, told by the statements that it commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) name: &'static str,
    /// A part of one of the statements.
    part: &'static str,
    /// A part that none of them has.
    unlike: &'static str,
    /// Whether it is committed by `commit`, or by the statement itself.
    in_transaction: Option<bool>,
}

const fn point(name: &'static str, part: &'static str) -> Point {
    Point {
        name,
        part,
        unlike: "\0",
        in_transaction: None,
    }
}

/// Every commit of a node or emitter that has a name.
pub(crate) const POINTS: [Point; 12] = [
    Point {
        unlike: "delete from pgmq.q_",
        in_transaction: Some(false),
        ..point("emit", "insert into core.event_log")
    },
    Point {
        unlike: "delete from pgmq.q_",
        in_transaction: Some(true),
        ..point("emit in a transaction", "insert into core.event_log")
    },
    point("claim", "last_read_at = core.now()"),
    point("extend", "set vt = core.now() + $3 * interval"),
    Point {
        in_transaction: Some(false),
        ..point("complete", "delete from pgmq.q_")
    },
    Point {
        in_transaction: Some(true),
        ..point("complete in a transaction", "delete from pgmq.q_")
    },
    point("retry", "set vt = core.now() + r.delay"),
    point("dead-letter", "core.dead_letter("),
    point("adopt", "core.adopt("),
    point("tick", "core.fire_ticks("),
    point("delayed emit", "core.emit_due("),
    point("registration", "insert into core.nodes"),
];

impl Point {
    fn is_in(&self, committed: &Committed<'_>) -> bool {
        self.in_transaction
            .is_none_or(|in_transaction| in_transaction == committed.in_transaction)
            && committed.texts.iter().any(|text| text.contains(self.part))
            && !committed
                .texts
                .iter()
                .any(|text| text.contains(self.unlike))
    }
}

/// What a commit stores.
struct Committed<'a> {
    texts: &'a [Arc<str>],
    in_transaction: bool,
}

/// On which side of the commit something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Everything has run, nothing is committed.
    Before,
    /// It is committed, and the process has not heard of it.
    After,
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    /// The process is killed.
    Kill,
    /// The connection is cut.
    Cut,
    /// The process is stopped in the middle of it, for so long.
    Pause(Duration),
}

struct Trap {
    point: Point,
    side: Side,
    deed: Deed,
    sprung: oneshot::Sender<()>,
}

/// How well bytes come through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// At once.
    Up,
    /// Up to so much later.
    Slow(Duration),
    /// Not at all; connections stay open on both sides.
    Silent,
    /// Requests come through, their answers are lost.
    Deaf,
    /// Connections are broken and refused.
    Down,
}

/// The line as its connections see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    line: Line,
    /// How often everything was cut so far.
    cuts: u64,
}

/// The line of one process.
pub(crate) struct Proxy {
    port: u16,
    state: watch::Sender<State>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    trap: Mutex<Option<Trap>>,
    pid: AtomicI32,
}

impl Proxy {
    pub(crate) async fn new(server: PathBuf) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (state, watched) = watch::channel(State {
            line: Line::Up,
            cuts: 0,
        });
        let shared = Arc::new(Shared::default());
        let of_all = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let passed = pass_on(client, server.clone(), watched.clone(), Arc::clone(&of_all));
                tokio::spawn(async move {
                    // However a connection ends, that is what the proxy is for.
                    let _ = passed.await;
                });
            }
        });
        Ok(Self {
            port,
            state,
            shared,
            task,
        })
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!(
            "postgres://{ROLE}@127.0.0.1:{}/{database}?sslmode=disable",
            self.port
        )
    }

    /// The process behind the proxy.
    pub(crate) fn belongs_to(&self, pid: Pid) {
        self.shared.pid.store(pid.as_raw_pid(), Ordering::Relaxed);
    }

    pub(crate) fn set(&self, line: Line) {
        self.state.send_modify(|state| state.line = line);
    }

    /// Breaks every connection; new ones come through if the line is up.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Arms a deed; the receiver hears when it is done, or fails when another one takes its place.
    pub(crate) fn arm(&self, point: Point, side: Side, deed: Deed) -> oneshot::Receiver<()> {
        let (sprung, hears) = oneshot::channel();
        *self.shared.lock() = Some(Trap {
            point,
            side,
            deed,
            sprung,
        });
        hears
    }

    pub(crate) fn disarm(&self) {
        *self.shared.lock() = None;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.set(Line::Down);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Trap>> {
        self.trap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_armed(&self, side: Side, committed: &Committed<'_>) -> bool {
        let trap = self.lock();
        trap.as_ref()
            .is_some_and(|trap| trap.side == side && trap.point.is_in(committed))
    }

    fn take(&self, side: Side, committed: &Committed<'_>) -> Option<Trap> {
        let mut trap = self.lock();
        trap.take_if(|trap| trap.side == side && trap.point.is_in(committed))
    }

    /// Does the deed; whether the connection goes on.
    async fn spring(&self, trap: Trap) -> bool {
        let goes_on = match trap.deed {
            Deed::Kill => {
                self.signal(Signal::KILL);
                false
            }
            Deed::Cut => false,
            Deed::Pause(pause) => {
                self.signal(Signal::STOP);
                tokio::time::sleep(pause).await;
                self.signal(Signal::CONT);
                true
            }
        };
        // Nobody may wait for it.
        let _ = trap.sprung.send(());
        goes_on
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid.load(Ordering::Relaxed)) {
            let _ = kill_process(pid, signal);
        }
    }
}

/// What is known of a connection's statements.
#[derive(Default)]
struct Statements {
    prepared: HashMap<Vec<u8>, Arc<str>>,
    portals: HashMap<Vec<u8>, Arc<str>>,
    /// Executed since the last `Sync`.
    executed: Vec<Arc<str>>,
    /// Executed since `begin`; `None` outside of a transaction.
    transaction: Option<Vec<Arc<str>>>,
}

/// A request that ends with an answer of its own, as the proxy sees it.
#[derive(Default)]
struct Request {
    /// What it commits.
    texts: Vec<Arc<str>>,
    in_transaction: bool,
    commits: bool,
    /// It is a `Sync`, before which everything has run.
    is_sync: bool,
}

impl Request {
    fn committed(&self) -> Committed<'_> {
        Committed {
            texts: &self.texts,
            in_transaction: self.in_transaction,
        }
    }
}

impl Statements {
    /// Reads a message of the client, and returns the request that it ends.
    fn read(&mut self, message: &[u8]) -> Option<Request> {
        let body = &message[5..];
        match message[0] {
            b'P' => {
                let (name, rest) = text(body);
                let (query, _) = text(rest);
                let query = String::from_utf8_lossy(query);
                self.prepared.insert(name.to_vec(), query.into());
                None
            }
            b'B' => {
                let (portal, rest) = text(body);
                let (name, _) = text(rest);
                if let Some(statement) = self.prepared.get(name) {
                    self.portals.insert(portal.to_vec(), Arc::clone(statement));
                }
                None
            }
            b'E' => {
                let (portal, _) = text(body);
                if let Some(statement) = self.portals.get(portal) {
                    self.executed.push(Arc::clone(statement));
                }
                None
            }
            b'Q' => {
                let (query, _) = text(body);
                self.executed.push(String::from_utf8_lossy(query).into());
                Some(self.end(false))
            }
            b'S' => Some(self.end(true)),
            _ => None,
        }
    }

    fn end(&mut self, is_sync: bool) -> Request {
        let executed = std::mem::take(&mut self.executed);
        let mut request = Request {
            is_sync,
            ..Request::default()
        };
        for text in executed {
            let word: String = text
                .trim_start()
                .chars()
                .take_while(char::is_ascii_alphabetic)
                .collect();
            match word.to_ascii_lowercase().as_str() {
                "begin" => self.transaction = Some(Vec::new()),
                "commit" => {
                    request.texts = self.transaction.take().unwrap_or_default();
                    request.in_transaction = true;
                    request.commits = true;
                }
                "rollback" if !text.to_ascii_lowercase().contains(" to ") => {
                    self.transaction = None;
                }
                _ => {
                    if let Some(transaction) = &mut self.transaction {
                        transaction.push(text);
                    } else {
                        request.texts.push(text);
                        request.commits = true;
                    }
                }
            }
        }
        request
    }
}

/// A text that ends with a zero, and what follows.
fn text(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    (&bytes[..end], bytes.get(end + 1..).unwrap_or_default())
}

/// Bytes that have come, cut into messages.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    read: usize,
}

impl Inbox {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.read);
        self.read = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message that is complete: a byte that says what it is, and a length.
    fn next(&mut self) -> Option<Vec<u8>> {
        self.take(1)
    }

    /// The first message of a client, which has only a length.
    fn first(&mut self) -> Option<Vec<u8>> {
        self.take(0)
    }

    fn take(&mut self, offset: usize) -> Option<Vec<u8>> {
        let rest = &self.bytes[self.read..];
        let length: [u8; 4] = rest.get(offset..offset + 4)?.try_into().ok()?;
        let length = offset + usize::try_from(u32::from_be_bytes(length)).ok()?;
        let message = rest.get(..length)?.to_vec();
        self.read += length;
        Some(message)
    }
}

const SSL_REQUEST: i32 = 80_877_103;
const CANCEL_REQUEST: i32 = 80_877_102;

/// Whether the first message of a client is from the app's role: the proxy's port is open to everybody on
/// the machine.
fn is_ours(startup: &[u8]) -> bool {
    let mut rest = startup.get(8..).unwrap_or_default();
    loop {
        let (name, after) = text(rest);
        let (value, after) = text(after);
        if name.is_empty() {
            return false;
        }
        if name == b"user" {
            return value == ROLE.as_bytes();
        }
        rest = after;
    }
}

/// Passes a connection on until one side ends it, or the line goes down.
async fn pass_on(
    mut client: TcpStream,
    server: PathBuf,
    mut state: watch::Receiver<State>,
    shared: Arc<Shared>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    let State { line, cuts } = *state.borrow_and_update();
    if line == Line::Down {
        return Ok(());
    }
    let mut from_client = Inbox::default();
    let startup = loop {
        let mut buffer = [0; 4096];
        let count = client.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        from_client.push(&buffer[..count]);
        if let Some(first) = from_client.first() {
            break first;
        }
    };
    let code = startup
        .get(4..8)
        .and_then(|code| code.try_into().ok())
        .map(i32::from_be_bytes);
    match code {
        Some(SSL_REQUEST) => return client.write_all(b"N").await,
        Some(CANCEL_REQUEST) => {
            return UnixStream::connect(&server)
                .await?
                .write_all(&startup)
                .await;
        }
        _ if !is_ours(&startup) => return Ok(()),
        _ => {}
    }
    if !comes_through(&mut state, cuts).await {
        return Ok(());
    }
    let mut server = UnixStream::connect(&server).await?;
    server.write_all(&startup).await?;
    let mut connection = Connection {
        client,
        server,
        from_client,
        from_server: Inbox::default(),
        statements: Statements::default(),
        awaited: std::collections::VecDeque::new(),
        held: Vec::new(),
        shared,
    };
    connection.run(&mut state, cuts).await
}

/// Waits until the line is not silent; false if it is down, or was cut meanwhile.
async fn comes_through(state: &mut watch::Receiver<State>, cuts: u64) -> bool {
    let is_over = |state: &State| state.line != Line::Silent || state.cuts != cuts;
    let found = state.wait_for(is_over).await;
    found.is_ok_and(|state| state.line != Line::Down && state.cuts == cuts)
}

struct Connection {
    client: TcpStream,
    server: UnixStream,
    from_client: Inbox,
    from_server: Inbox,
    statements: Statements,
    /// Requests that have been passed on and are not answered.
    awaited: std::collections::VecDeque<Request>,
    /// Answers that are kept back until it is known what to do with them.
    held: Vec<u8>,
    shared: Arc<Shared>,
}

impl Connection {
    async fn run(&mut self, state: &mut watch::Receiver<State>, cuts: u64) -> io::Result<()> {
        let (mut a, mut b) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
        let mut was_deaf = false;
        while comes_through(state, cuts).await {
            let line = state.borrow_and_update().line;
            was_deaf |= line == Line::Deaf;
            // What was lost on the way cannot be made up for.
            if was_deaf && line != Line::Deaf {
                break;
            }
            tokio::select! {
                biased;
                changed = state.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                count = self.client.read(&mut a) => {
                    let count = count?;
                    if count == 0 {
                        break;
                    }
                    dawdle(line).await;
                    self.from_client.push(&a[..count]);
                    if !self.requests().await? {
                        break;
                    }
                }
                count = self.server.read(&mut b) => {
                    let count = count?;
                    if count == 0 {
                        break;
                    }
                    if line == Line::Deaf {
                        continue;
                    }
                    dawdle(line).await;
                    self.from_server.push(&b[..count]);
                    if !self.answers().await? {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Passes requests on; whether the connection goes on.
    async fn requests(&mut self) -> io::Result<bool> {
        let mut out = Vec::new();
        while let Some(message) = self.from_client.next() {
            let Some(request) = self.statements.read(&message) else {
                out.extend_from_slice(&message);
                continue;
            };
            if request.commits && self.shared.is_armed(Side::Before, &request.committed()) {
                self.server.write_all(&out).await?;
                out.clear();
                // Only one that stores something counts.
                let stores = !request.is_sync || self.awaited.is_empty() && self.has_rows().await?;
                if stores
                    && let Some(trap) = self.shared.take(Side::Before, &request.committed())
                    && !self.shared.spring(trap).await
                {
                    return Ok(false);
                }
            }
            out.extend_from_slice(&message);
            self.awaited.push_back(request);
        }
        self.server.write_all(&out).await?;
        Ok(true)
    }

    /// Has the statement run that was sent, without letting it commit, and says whether it returned rows.
    async fn has_rows(&mut self) -> io::Result<bool> {
        const FLUSH: [u8; 5] = [b'H', 0, 0, 0, 4];
        self.server.write_all(&FLUSH).await?;
        let mut rows = 0;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            while let Some(message) = self.from_server.next() {
                let kind = message[0];
                self.held.extend_from_slice(&message);
                match kind {
                    b'D' => rows += 1,
                    // Done, or refused.
                    b'C' => return Ok(rows > 0),
                    b'E' | b'Z' => return Ok(false),
                    _ => {}
                }
            }
            let count = self.server.read(&mut buffer).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.from_server.push(&buffer[..count]);
        }
    }

    /// Passes answers on; whether the connection goes on.
    async fn answers(&mut self) -> io::Result<bool> {
        while let Some(message) = self.from_server.next() {
            let kind = message[0];
            self.held.extend_from_slice(&message);
            if kind != b'Z' {
                continue;
            }
            if let Some(request) = self.awaited.pop_front()
                && request.commits
                && stores(&self.held, request.in_transaction)
                && let Some(trap) = self.shared.take(Side::After, &request.committed())
                && !self.shared.spring(trap).await
            {
                return Ok(false);
            }
            let held = std::mem::take(&mut self.held);
            self.client.write_all(&held).await?;
        }
        // Before the first request, and notifications: nothing is waited for.
        if self.awaited.is_empty() {
            let held = std::mem::take(&mut self.held);
            self.client.write_all(&held).await?;
        }
        Ok(true)
    }
}

/// Whether an answer says that something was stored: rows, or the end of a transaction; and no error.
fn stores(answer: &[u8], in_transaction: bool) -> bool {
    let mut inbox = Inbox::default();
    inbox.push(answer);
    let (mut rows, mut failed) = (in_transaction, false);
    while let Some(message) = inbox.next() {
        match message[0] {
            b'D' => rows = true,
            b'E' => failed = true,
            _ => {}
        }
    }
    rows && !failed
}

async fn dawdle(line: Line) {
    if let Line::Slow(most) = line {
        tokio::time::sleep(most.mul_f64(fastrand::f64())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, parts: &[&str]) -> Vec<u8> {
        let body: Vec<u8> = parts
            .iter()
            .flat_map(|part| part.bytes().chain([0]))
            .collect();
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[kind], &length.to_be_bytes()[..], &body].concat()
    }

    #[test]
    fn a_commit_is_known_by_what_it_commits() {
        let mut statements = Statements::default();
        let complete = "delete from pgmq.q_core_events_faults__small q using …";
        assert!(statements.read(&message(b'P', &["s1", complete])).is_none());
        assert!(statements.read(&message(b'B', &["", "s1"])).is_none());
        assert!(statements.read(&message(b'E', &[""])).is_none());
        let alone = statements.read(&message(b'S', &[])).unwrap();
        assert!(alone.commits && !alone.in_transaction);

        let begun = statements
            .read(&message(b'Q', &["begin; set local x = 1"]))
            .unwrap();
        assert!(!begun.commits);
        statements.read(&message(b'B', &["", "s1"]));
        statements.read(&message(b'E', &[""]));
        assert!(!statements.read(&message(b'S', &[])).unwrap().commits);
        let together = statements.read(&message(b'Q', &["COMMIT"])).unwrap();
        assert!(together.commits && together.in_transaction);

        let named = |request: &Request| -> Vec<&str> {
            POINTS
                .iter()
                .filter(|point| point.is_in(&request.committed()))
                .map(|point| point.name)
                .collect()
        };
        assert_eq!(named(&alone), ["complete"]);
        assert_eq!(named(&together), ["complete in a transaction"]);
    }

    #[test]
    fn messages_are_cut_wherever_the_bytes_end() {
        let bytes = [message(b'Q', &["select 1"]), message(b'S', &[])].concat();
        let mut inbox = Inbox::default();
        let mut found = Vec::new();
        for byte in bytes.chunks(3) {
            inbox.push(byte);
            while let Some(message) = inbox.next() {
                found.push(message[0]);
            }
        }
        assert_eq!(found, [b'Q', b'S']);
    }

    #[test]
    fn only_the_role_of_the_app_comes_through() {
        let startup = |user: &str| {
            let parameters = format!("database\0x\0user\0{user}\0\0");
            [&[0_u8; 8], parameters.as_bytes()].concat()
        };
        assert!(is_ours(&startup(ROLE)));
        assert!(!is_ours(&startup("admin")));
        assert!(!is_ours(&[0; 8]));
    }
}
