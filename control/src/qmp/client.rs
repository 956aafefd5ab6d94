//! The client's end of a control socket. Every wait has a limit.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::line::{Line, LineReader};
use super::message::{Arguments, ErrorClass, QmpError};

/// How long most commands may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// How long the greeting may take.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// An answer longer than this is not read.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Events kept while a command waits for its answer; the oldest go first.
const MAX_KEPT_EVENTS: usize = 10_000;

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing is there.
    #[error("there is no control socket at {0}: is a machine running? (--name or --control say which one)")]
    Absent(PathBuf),
    /// Nobody answers there.
    #[error("nobody answers at the control socket {0}: the process that opened it has ended")]
    Stale(PathBuf),
    /// It could not be reached for another reason.
    #[error("cannot connect to the control socket {0}: {1}")]
    Connect(PathBuf, #[source] io::Error),
    /// What answers does not speak QMP.
    #[error("{0} is not a control socket: {1}")]
    NotQmp(PathBuf, String),
    /// The other end hung up.
    #[error("the process behind the control socket has ended or hung up")]
    Closed,
    /// Reading or writing failed.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// No answer in time.
    #[error("no answer to `{command}` within {limit:?}")]
    TimedOut {
        /// The command.
        command: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The command was refused or failed.
    #[error("{0}")]
    Command(#[from] QmpError),
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `STOP`, `MIGRATION`, …
    pub name: String,
    /// What is told of it.
    pub data: Value,
    /// The message as it came.
    pub message: Value,
}

/// A connection to a control socket.
pub struct Client {
    lines: LineReader<UnixStream>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Client {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ClientError::Absent(path.to_owned()),
            io::ErrorKind::ConnectionRefused => ClientError::Stale(path.to_owned()),
            _ => ClientError::Connect(path.to_owned(), error),
        })?;
        stream.set_write_timeout(Some(COMMAND_LIMIT))?;
        let lines = LineReader::new(stream, MAX_ANSWER_BYTES);
        let mut client = Client { lines, events: VecDeque::new(), next_id: 1 };
        let not_qmp = |what: &str| ClientError::NotQmp(path.to_owned(), what.to_owned());
        match client.message_until(Instant::now() + GREETING_LIMIT) {
            Ok(Some(greeting)) if greeting.get("QMP").is_some() => {}
            Ok(Some(_)) => return Err(not_qmp("it does not greet as QMP does")),
            Ok(None) => return Err(not_qmp("it does not greet")),
            Err(ClientError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(not_qmp(&error.to_string()));
            }
            Err(error) => return Err(error),
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Executes a command that takes no longer than [`COMMAND_LIMIT`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_within(command, arguments, COMMAND_LIMIT)
    }

    /// Executes a command. Events that arrive meanwhile are kept for [`Client::next_event`].
    pub fn execute_within(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        self.lines.get_ref().write_all(line.as_bytes()).map_err(closed)?;
        let deadline = Instant::now() + limit;
        loop {
            let Some(message) = self.message_until(deadline)? else {
                return Err(ClientError::TimedOut { command: command.to_owned(), limit });
            };
            if message.get("id") == Some(&json!(id)) {
                return answer(message);
            }
            self.keep(message);
        }
    }

    /// The next event, or `None` if there is none within `limit`.
    pub fn next_event(&mut self, limit: Duration) -> Result<Option<Event>, ClientError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.message_until(deadline)? {
                Some(message) => self.keep(message),
                None => return Ok(None),
            }
        }
    }

    fn keep(&mut self, message: Value) {
        let Some(name) = message.get("event").and_then(Value::as_str) else { return };
        if self.events.len() == MAX_KEPT_EVENTS {
            self.events.pop_front();
        }
        let data = message.get("data").cloned().unwrap_or(Value::Null);
        self.events.push_back(Event { name: name.to_owned(), data, message });
    }

    /// The next message, or `None` at the deadline.
    fn message_until(&mut self, deadline: Instant) -> Result<Option<Value>, ClientError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.lines.get_ref().set_read_timeout(Some(left))?;
            match self.lines.next_line() {
                Ok(Line::Text(line)) => {
                    let message = serde_json::from_slice(&line);
                    return Ok(Some(message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?));
                }
                Ok(Line::TooLong) => {
                    let text = format!("an answer of more than {MAX_ANSWER_BYTES} bytes");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text).into());
                }
                Ok(Line::End) => return Err(ClientError::Closed),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) => return Err(closed(error)),
            }
        }
    }
}

fn answer(mut message: Value) -> Result<Value, ClientError> {
    if let Some(value) = message.get_mut("return") {
        return Ok(value.take());
    }
    let text = |key: &str| message.pointer(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let class = match text("/error/class").as_str() {
        "CommandNotFound" => ErrorClass::CommandNotFound,
        _ => ErrorClass::GenericError,
    };
    Err(QmpError { class, desc: text("/error/desc") }.into())
}

fn closed(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}

/// Arguments from pairs, leaving out those that were not given.
pub fn given<const N: usize>(pairs: [(&str, Option<Value>); N]) -> Value {
    let given = pairs.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(given.collect::<Arguments>())
}
