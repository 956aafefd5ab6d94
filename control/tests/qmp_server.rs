//! The QMP server over real unix sockets: clients that behave, and clients that do not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_control::qmp::line::MAX_LINE_BYTES;
use godwit_control::qmp::outbox::QUEUE_LINES;
use godwit_control::qmp::socket::ControlSocket;
use godwit_control::qmp::{Answer, Arguments, Caller, Client, ClientError, ErrorClass, Handler, Hub, QmpError, Server};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

/// The caller of `until-gone` has been seen to be gone.
static GONE: AtomicBool = AtomicBool::new(false);

struct Echo;

impl Handler for Echo {
    fn execute(&self, caller: &Caller, command: &str, arguments: Arguments) -> Answer {
        match command {
            "echo" => Ok(Value::Object(arguments)),
            "fail" => Err(QmpError::generic("it failed")),
            "until-gone" => {
                while !caller.is_gone() {
                    thread::sleep(Duration::from_millis(5));
                }
                GONE.store(true, Ordering::Release);
                Ok(json!({}))
            }
            "slow" => {
                thread::sleep(Duration::from_millis(500));
                Ok(json!({}))
            }
            _ => Err(QmpError::command_not_found(command)),
        }
    }
}

struct Served {
    _directory: tempfile::TempDir,
    path: PathBuf,
    hub: Hub,
    server: Server,
}

fn serve() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    let hub = Hub::new();
    let server = Server::start(ControlSocket::bind(&path).unwrap(), Arc::new(Echo), hub.clone()).unwrap();
    Served { _directory: directory, path, hub, server }
}

/// A client that sends whatever it likes.
struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn connect(served: &Served) -> Self {
        let stream = UnixStream::connect(&served.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut raw = Raw { stream, lines };
        assert!(raw.read()["QMP"]["capabilities"].is_array());
        raw
    }

    fn negotiated(served: &Served) -> Self {
        let mut raw = Self::connect(served);
        assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
        raw
    }

    fn ask(&mut self, line: &str) -> Value {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\n").unwrap();
        self.read()
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

fn class(answer: &Value) -> &str {
    answer["error"]["class"].as_str().unwrap()
}

#[test]
fn every_command_before_negotiation_is_not_found() {
    let served = serve();
    let mut raw = Raw::connect(&served);
    let answer = raw.ask(r#"{"execute":"echo","id":3}"#);
    assert_eq!((class(&answer), &answer["id"]), ("CommandNotFound", &json!(3)));
    assert_eq!(class(&raw.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#)), "GenericError");
    assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities","id":null}"#), json!({"return": {}, "id": null}));
    assert_eq!(class(&raw.ask(r#"{"execute":"qmp_capabilities"}"#)), "CommandNotFound");
    assert_eq!(raw.ask(r#"{"execute":"echo","arguments":{"a":[1]}}"#), json!({"return": {"a": [1]}}));
}

#[test]
fn a_client_that_ends_no_line_is_answered() {
    let served = serve();
    let mut raw = Raw::connect(&served);
    raw.stream.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
    assert_eq!(raw.read(), json!({"return": {}}));
    raw.stream.write_all(br#"{"execute":"echo","arguments":{"a":"}"},"id":1}{"execute":"echo","id":2}"#).unwrap();
    assert_eq!(raw.read()["return"], json!({"a": "}"}));
    assert_eq!(raw.read()["id"], 2);
}

#[test]
fn garbage_is_answered_and_the_connection_survives() {
    let served = serve();
    let mut raw = Raw::negotiated(&served);
    for garbage in ["GET / HTTP/1.1", "{", "[]", "7", r#"{"execute":"echo","extra":1}"#, "\u{0}\u{1}"] {
        assert_eq!(class(&raw.ask(garbage)), "GenericError", "{garbage}");
    }
    raw.stream.write_all(b"\xff\xfe\n").unwrap();
    assert_eq!(class(&raw.read()), "GenericError");
    let long = "x".repeat(2 * MAX_LINE_BYTES);
    assert!(raw.ask(&long)["error"]["desc"].as_str().unwrap().contains("longer than"));
    assert_eq!(raw.ask(r#"{"execute":"echo"}"#), json!({"return": {}}));
}

#[test]
fn a_line_that_never_ends_takes_no_memory_and_hurts_nobody() {
    let served = serve();
    let mut raw = Raw::connect(&served);
    for _ in 0..64 {
        raw.stream.write_all(&vec![b'x'; MAX_LINE_BYTES / 4]).unwrap();
    }
    drop(raw);
    assert_eq!(Raw::negotiated(&served).ask(r#"{"execute":"echo"}"#), json!({"return": {}}));
}

#[test]
fn two_clients_are_served_at_once_and_both_hear_events() {
    let served = serve();
    let mut slow = Client::connect(&served.path).unwrap();
    let mut quick = Client::connect(&served.path).unwrap();
    let begin = Instant::now();
    let waiting = thread::spawn(move || (slow.execute("slow", json!({})).unwrap(), slow));
    assert_eq!(quick.execute("echo", json!({"n": 1})).unwrap(), json!({"n": 1}));
    assert!(begin.elapsed() < Duration::from_millis(400));
    served.hub.publish("STOP", Value::Null);
    let (_, mut slow) = waiting.join().unwrap();
    for client in [&mut slow, &mut quick] {
        let event = client.next_event(LIMIT).unwrap().unwrap();
        assert_eq!(event.name, "STOP");
        assert!(event.message["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
    }
}

#[test]
fn a_client_that_reads_nothing_is_dropped_and_blocks_nobody() {
    let served = serve();
    let raw = Raw::negotiated(&served);
    let mut reading = Client::connect(&served.path).unwrap();
    let text = "x".repeat(1000);
    for _ in 0..QUEUE_LINES + 2000 {
        served.hub.publish("GODWIT_PROGRESS", json!({ "text": text }));
        assert!(reading.next_event(LIMIT).unwrap().is_some());
    }
    let deadline = Instant::now() + LIMIT;
    while served.server.client_count() > 1 {
        assert!(Instant::now() < deadline, "the client that does not read is still there");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(reading.execute("echo", json!({})).unwrap(), json!({}));
    drop(raw);
}

#[test]
fn the_client_tells_mistakes_apart() {
    let served = serve();
    let mut client = Client::connect(&served.path).unwrap();
    let ClientError::Command(error) = client.execute("fail", json!({})).unwrap_err() else { panic!() };
    assert_eq!(error, QmpError::generic("it failed"));
    let ClientError::Command(error) = client.execute("frobnicate", json!({})).unwrap_err() else { panic!() };
    assert_eq!(error.class, ErrorClass::CommandNotFound);
    let late = client.execute_within("slow", json!({}), Duration::from_millis(50));
    assert!(matches!(late, Err(ClientError::TimedOut { .. })));
    // The late answer is not taken for that of the next command.
    assert_eq!(client.execute("echo", json!({"n": 2})).unwrap(), json!({"n": 2}));
    let missing = served.path.with_extension("none");
    assert!(matches!(Client::connect(&missing), Err(ClientError::Absent(_))));
    drop(served);
    assert!(matches!(client.execute("echo", json!({})), Err(ClientError::Closed)));
}

#[test]
fn a_command_can_tell_that_its_caller_is_gone() {
    let served = serve();
    let mut raw = Raw::negotiated(&served);
    raw.stream.write_all(b"{\"execute\":\"until-gone\"}\n").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(!GONE.load(Ordering::Acquire), "it is still there");
    drop(raw);
    let until = Instant::now() + LIMIT;
    while !GONE.load(Ordering::Acquire) {
        assert!(Instant::now() < until, "nobody noticed that the client hung up");
        thread::sleep(Duration::from_millis(5));
    }
}
