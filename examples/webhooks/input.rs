//! From bytes to events. Whatever a file holds, a line ends as an event or as a reason.

use std::{
    borrow::Cow,
    fmt::Write as _,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    thread,
};

use nexus::{Event, prelude::*};
use serde_json::{error::Category, value::RawValue};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::events::{Other, Webhook};

/// GitHub sends no payload over 25 MB. More than this of a line is not held in memory.
const LONGEST_LINE: u64 = 32 * 1024 * 1024;

/// Lines that may wait to be emitted.
const READ_AHEAD: usize = 16;

/// A longer reason quotes a text of the line, of which the beginning is enough.
const LONGEST_REASON: usize = 300;

/// Where lines come from.
pub(crate) struct Input {
    name: String,
    bytes: Option<u64>,
    source: Box<dyn Read + Send>,
}

/// A line that was read.
#[derive(Debug)]
pub(crate) struct Line {
    /// Counts from 1.
    pub(crate) number: u64,
    /// With its end.
    pub(crate) bytes: u64,
    pub(crate) idempotency_key: Option<String>,
    /// The event, or why there is none.
    pub(crate) webhook: Result<Webhook, String>,
}

impl Input {
    /// A file, or standard input as `-`.
    pub(crate) fn open(file: &Path) -> nexus::Result<Self> {
        if file == Path::new("-") {
            return Ok(Self::new("standard input", io::stdin()));
        }
        let failed = |error| format!("could not open `{}`: {error}", file.display());
        let opened = File::open(file).map_err(failed)?;
        let metadata = opened.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(format!("`{}` is a directory; give a file", file.display()).into());
        }
        let bytes = metadata.is_file().then_some(metadata.len());
        Ok(Self {
            bytes,
            ..Self::new(&file.display().to_string(), opened)
        })
    }

    /// Anything that can be read.
    pub(crate) fn new(name: &str, source: impl Read + Send + 'static) -> Self {
        Self {
            name: name.to_owned(),
            bytes: None,
            source: Box::new(source),
        }
    }

    /// How much there is, if that is known.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.bytes
    }

    /// Reads on a thread of its own, as far ahead as `READ_AHEAD` says. After an error of the
    /// source nothing follows. The thread ends with the process if the source blocks for ever.
    pub(crate) fn read(self, with_keys: bool) -> mpsc::Receiver<io::Result<Line>> {
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        thread::spawn(move || {
            let mut reader = BufReader::with_capacity(64 * 1024, self.source);
            let mut buffer = Vec::new();
            for number in 1.. {
                let line = match read_line(&mut reader, &mut buffer) {
                    Ok(0) => return,
                    Ok(bytes) => Ok(Line::new(number, bytes, &buffer, with_keys)),
                    Err(error) => Err(io::Error::new(
                        error.kind(),
                        format!(
                            "could not read {} after line {}: {error}",
                            self.name,
                            number - 1
                        ),
                    )),
                };
                let is_last = line.is_err();
                // Without a receiver the run has failed already.
                if sender.blocking_send(line).is_err() || is_last {
                    return;
                }
            }
        });
        receiver
    }
}

/// Reads up to and with the next line feed; of a line that is too long, only its beginning is kept.
/// Returns how many bytes the line has, 0 at the end.
fn read_line(reader: &mut impl BufRead, buffer: &mut Vec<u8>) -> io::Result<u64> {
    buffer.clear();
    let read = reader
        .by_ref()
        .take(LONGEST_LINE + 1)
        .read_until(b'\n', buffer)? as u64;
    if read <= LONGEST_LINE || buffer.ends_with(b"\n") {
        return Ok(read);
    }
    Ok(read + reader.skip_until(b'\n')? as u64)
}

impl Line {
    fn new(number: u64, bytes: u64, content: &[u8], with_key: bool) -> Self {
        let content = content
            .strip_prefix("\u{feff}".as_bytes())
            .unwrap_or(content)
            .trim_ascii();
        let webhook = if bytes > LONGEST_LINE {
            Err(format!("longer than {LONGEST_LINE} bytes"))
        } else {
            parse(content).map_err(|reason| printable(&reason))
        };
        let idempotency_key = with_key.then(|| hash(content));
        Self {
            number,
            bytes,
            idempotency_key,
            webhook,
        }
    }
}

fn hash(content: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(content) {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
    }
    text
}

/// The shape of a line.
#[derive(Deserialize)]
struct Delivery<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    payload: &'a RawValue,
}

fn parse(content: &[u8]) -> Result<Webhook, String> {
    if content.is_empty() {
        return Err("blank".to_owned());
    }
    let text = str::from_utf8(content)
        .map_err(|error| format!("not UTF-8: byte {} is wrong", error.valid_up_to() + 1))?;
    let delivery: Delivery<'_> = serde_json::from_str(text).map_err(|error| {
        let (what, column) = (without_place(&error), error.column());
        match error.classify() {
            Category::Data => format!("not a delivery: {what}"),
            _ => format!("not JSON: {what} at column {column}"),
        }
    })?;
    // An array with the right elements would do for a struct.
    if !text.starts_with('{') {
        return Err("not a delivery: an array, expected an object".to_owned());
    }
    if !delivery.payload.get().starts_with('{') {
        return Err("not a delivery: at `payload`: expected an object".to_owned());
    }
    match Webhook::known(&delivery.event, delivery.payload) {
        Some(webhook) => webhook,
        // The line itself is such an event. Read as a whole, it nests no deeper for us than it
        // will for the handlers.
        None => serde_json::from_str::<Other>(text)
            .map(Webhook::Other)
            .map_err(|error| format!("the payload cannot be kept: {}", without_place(&error))),
    }
}

/// The payload as an event, or where it does not fit.
pub(super) fn fit<E: Event>(payload: &RawValue) -> Result<E, String> {
    let deserializer = &mut serde_json::Deserializer::from_str(payload.get());
    serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let place = match error.path().to_string().as_str() {
            "." => "payload".to_owned(),
            path => format!("payload.{path}"),
        };
        format!(
            "no `{}`: at `{place}`: {}",
            E::EVENT_TYPE,
            without_place(error.inner())
        )
    })
}

/// The error without "at line 1 column 5", whose line is not the one of the file.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

/// A reason may quote the line: nothing of it shall move a terminal's cursor, or fill the screen.
fn printable(reason: &str) -> String {
    let mut text = String::new();
    for c in reason.chars() {
        if text.len() > LONGEST_REASON {
            text.push('…');
            break;
        }
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}
