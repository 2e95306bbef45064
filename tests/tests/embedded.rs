//! The embedded server as programs and tests of users meet it: killed beneath a running app, made
//! by other migrations, or replaced by a URL that is of no use.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nexus::{prelude::*, testing::TestDatabase};
use nexus_embedded::{Options, Server};
use nexus_tests::{until, within};
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;
use tokio::sync::mpsc;

#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "embedded.note")]
struct Note {
    number: i64,
}

#[handler(backoff = "fixed(100ms)")]
async fn take_note(
    note: Note,
    tx: &mut Tx,
    saw: State<mpsc::UnboundedSender<i64>>,
) -> nexus::Result {
    sqlx::query("insert into notes (number) values ($1)")
        .bind(note.number)
        .execute(&mut **tx)
        .await?;
    let _ = saw.send(note.number);
    Ok(())
}

/// A folder for a cluster of the test's own, which the server's user can reach.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory
    } else {
        Path::new("/tmp")
    };
    tempfile::Builder::new()
        .prefix("nx")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .unwrap()
}

async fn start(options: Options) -> Server {
    tokio::task::spawn_blocking(move || Server::start(&options))
        .await
        .unwrap()
        .unwrap()
}

/// The first line of its `postmaster.pid`.
fn pid(server: &Server) -> String {
    let text = fs::read_to_string(server.data_folder().join("postmaster.pid")).unwrap();
    text.lines().next().unwrap().to_owned()
}

fn signal(name: &str, pid: &str) -> bool {
    let sent = Command::new("/bin/sh")
        .args(["-c", "kill -s \"$0\" \"$1\" 2>/dev/null", name, pid])
        .status();
    sent.unwrap().success()
}

/// Waits for a server to stop that nobody uses any more.
async fn gone(pid: &str) {
    until("the server stops", async || {
        let state = Command::new("ps")
            .args(["-o", "stat=", "-p", pid])
            .output()
            .unwrap();
        let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
        (state.is_empty() || state.starts_with('Z')).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_app_outlives_its_server_and_works_on_with_the_next_one() {
    let folder = folder();
    // Durable: a server for tests may lose what it committed last.
    let options = Options::dev()
        .data_folder(folder.path())
        .grace(Duration::from_millis(200));
    let first = start(options.clone()).await;
    let (saw, mut seen) = mpsc::unbounded_channel::<i64>();
    let app = App::discover()
        .only(["take_note"])
        .database_url(first.url("nexus"))
        .state(saw);
    let app = nexus::start(app).await.unwrap();
    let mut connection = PgConnection::connect(&first.url("nexus")).await.unwrap();
    sqlx::query("create table notes (number bigint)")
        .execute(&mut connection)
        .await
        .unwrap();
    app.client().emit(&Note { number: 1 }).await.unwrap();
    assert_eq!(
        within("the first note is taken", seen.recv()).await,
        Some(1)
    );
    // And committed: it is not taken again.
    within("the first note is settled", app.idle())
        .await
        .unwrap();

    let killed = pid(&first);
    assert!(signal("KILL", &killed));
    // The next who asks for a database finds it dead and starts another, on the same data.
    let second = start(options).await;
    assert!(second.was_started());
    assert_ne!(pid(&second), killed);
    assert_eq!(second.url("nexus"), first.url("nexus"));
    until("an emit succeeds", async || {
        app.client().emit(&Note { number: 2 }).await.ok()
    })
    .await;
    assert_eq!(
        within("the second note is taken", seen.recv()).await,
        Some(2)
    );
    within("all is settled", app.idle()).await.unwrap();
    let mut connection = PgConnection::connect(&second.url("nexus")).await.unwrap();
    let numbers: Vec<i64> = sqlx::query_scalar("select number from notes order by number")
        .fetch_all(&mut connection)
        .await
        .unwrap();
    assert_eq!(numbers, [1, 2]);
    drop(connection);
    app.shutdown().await;

    let running = pid(&second);
    drop((first, second));
    gone(&running).await;
}

/// What a program says that does not start with the embedded server in `folder`.
fn said_in(folder: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_victim"))
        .env_remove("DATABASE_URL")
        .env_remove("CORE_DATABASE_URL")
        .env("VICTIM_HANDLERS", "work")
        .env("NEXUS_PG_DATA", folder)
        .output()
        .unwrap();
    assert!(!output.status.success(), "it started");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn data_of_other_migrations_are_named_by_their_folder() {
    let folder = folder();
    let options = Options::dev().data_folder(folder.path());
    let server = start(options).await;
    let url = server.url("nexus");
    nexus_migrations::up(&url.parse().unwrap()).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("update core.schema_migrations set checksum = 'of a draft' where version = 2")
        .execute(&mut connection)
        .await
        .unwrap();
    drop(connection);
    let text = said_in(folder.path());
    let cluster = server.data_folder().parent().unwrap();
    assert!(
        text.contains(&format!("delete {} to start empty", cluster.display())),
        "{text}"
    );
    assert!(text.contains("migration 0002_"), "{text}");

    // And that is a way out, also while the server still runs.
    fs::remove_dir_all(cluster).unwrap();
    let server = start(Options::dev().data_folder(folder.path())).await;
    nexus_migrations::up(&url.parse().unwrap())
        .await
        .unwrap_err();
    nexus_migrations::up(&server.url("nexus").parse().unwrap())
        .await
        .unwrap();
    let running = pid(&server);
    drop(server);
    gone(&running).await;
}

#[tokio::test]
async fn the_start_says_how_to_look_into_the_database() {
    let folder = folder();
    let server = start(Options::dev().data_folder(folder.path())).await;
    let psql = server.psql("nexus");
    let mut app = Command::new(env!("CARGO_BIN_EXE_victim"))
        .env_remove("DATABASE_URL")
        .env_remove("CORE_DATABASE_URL")
        .env("VICTIM_HANDLERS", "work")
        .env("VICTIM_STAYS", "1")
        .env("NEXUS_PG_DATA", folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(app.stderr.take().unwrap()).lines();
    let said: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.contains("collected"))
        .collect();
    app.kill().unwrap();
    app.wait().unwrap();
    assert!(
        said.iter().any(|line| line.ends_with(&psql)),
        "no {psql} in {said:#?}"
    );

    let path = std::env::var("PATH").unwrap();
    let shown = Command::new("sh")
        .args(["-c", &format!("{psql} -Atc 'select current_database()'")])
        .env("PATH", format!("{path}:{}", server.binaries().display()))
        // As if it had been written for another server.
        .envs([("PGHOST", "nowhere"), ("PGPORT", "1"), ("PGUSER", "nobody")])
        .output()
        .unwrap();
    assert!(shown.status.success(), "{shown:?}");
    assert_eq!(shown.stdout, b"nexus\n");
    let running = pid(&server);
    drop(server);
    gone(&running).await;
}

/// What a test of a user says that makes a database on the server at `url`.
fn test_says(url: &str) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "plays_a_test_of_a_user", "--nocapture"])
        .env_remove("CORE_DATABASE_URL")
        .env("DATABASE_URL", url)
        .env("NEXUS_TESTS_PLAY", "1")
        .output()
        .unwrap();
    assert!(!status.success(), "it got a database");
    String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr)
}

/// Not a test, but the other process of tests.
#[tokio::test]
async fn plays_a_test_of_a_user() {
    if std::env::var_os("NEXUS_TESTS_PLAY").is_some() {
        TestDatabase::new().await;
    }
}

#[test]
fn a_url_that_is_of_no_use_to_tests_is_named_without_its_password() {
    let text = test_says("postgres://ada:s3cret@127.0.0.1:1/shop");
    assert!(
        text.contains("DATABASE_URL is set but 127.0.0.1:1/shop is not usable: "),
        "{text}"
    );
    assert!(
        text.contains(". Unset it to use the embedded database"),
        "{text}"
    );
    assert!(!text.contains("s3cret"), "{text}");
}

#[tokio::test]
async fn a_role_that_may_not_create_databases_is_told_so() {
    let database = TestDatabase::new().await;
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    // Roles belong to the whole server, so its name is as unique as the database's.
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    let role = format!("{name}_humble");
    let mut execute = async |statement: String| {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&mut connection)
            .await
            .unwrap();
    };
    execute(format!("create role {role} login password 's3cret'")).await;
    // Put the role in the place of the user that the URL names.
    let (scheme, rest) = database.url().split_once("://").expect("it is a URL");
    let (_, host) = rest.split_once('@').expect("the URL names a user");
    let text = test_says(&format!("{scheme}://{role}:s3cret@{host}"));
    execute(format!("drop role {role}")).await;
    assert!(
        text.contains(
            "the role in DATABASE_URL may not create databases; tests need that (alter role … createdb)"
        ),
        "{text}"
    );
    assert!(!text.contains("s3cret"), "{text}");
}

#[tokio::test]
async fn a_server_is_started_with_the_settings_that_were_asked_for() {
    let folder = folder();
    let options = Options::dev()
        .data_folder(folder.path())
        .grace(Duration::from_millis(200))
        .setting("work_mem", "7MB");
    let server = start(options).await;
    let mut connection = PgConnection::connect(&server.url("nexus")).await.unwrap();
    let work_mem: String = sqlx::query_scalar("show work_mem")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(work_mem, "7MB");
}
