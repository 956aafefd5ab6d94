//! The keeper of a receiver that waits, over its real control socket. (With a machine: the end-to-end tests.)

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use godwit_control::keeper::{End, Keeper, KeeperHandle, StopCause};
use godwit_control::parameters::Settings;
use godwit_control::qmp::socket::ControlSocket;
use godwit_control::qmp::{Client, ClientError, Hub};
use godwit_core::{HangUp, Phase};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

struct Kept {
    _directory: tempfile::TempDir,
    path: PathBuf,
    handle: KeeperHandle,
    ended: JoinHandle<End>,
}

fn keep() -> Kept {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("receiver.sock");
    let socket = ControlSocket::bind(&path).unwrap();
    let keeper = Keeper::start(socket, "receiver-1", Settings::default(), Hub::new()).unwrap();
    let handle = keeper.handle();
    Kept { _directory: directory, path, handle, ended: thread::spawn(move || keeper.run()) }
}

#[derive(Default)]
struct Line(AtomicBool);

impl HangUp for Line {
    fn hang_up(&self) {
        self.0.store(true, Ordering::Release);
    }
}

fn ask(client: &mut Client, command: &str) -> Value {
    client.execute(command, json!({})).unwrap()
}

fn refusal(client: &mut Client, command: &str, arguments: Value) -> String {
    match client.execute(command, arguments) {
        Err(ClientError::Command(error)) => error.desc,
        other => panic!("{command}: {other:?}"),
    }
}

fn next_status(client: &mut Client) -> String {
    loop {
        let event = client.next_event(LIMIT).unwrap().unwrap();
        if event.name == "MIGRATION" {
            return event.data["status"].as_str().unwrap().to_owned();
        }
    }
}

#[test]
fn without_a_machine_it_says_so() {
    let kept = keep();
    let mut client = Client::connect(&kept.path).unwrap();
    assert_eq!(ask(&mut client, "query-status")["status"], "inmigrate");
    assert_eq!(ask(&mut client, "query-name")["name"], "receiver-1");
    assert_eq!(ask(&mut client, "query-migrate"), json!({}));
    for command in ["stop", "cont", "query-guest-ram", "x-godwit-guest-check", "x-godwit-machine-definition"] {
        assert!(refusal(&mut client, command, json!({})).contains("no machine"), "{command}");
    }
    assert!(refusal(&mut client, "migrate", json!({ "uri": "tcp:127.0.0.1:1" })).contains("no machine"));
    let names: Vec<Value> = serde_json::from_value(ask(&mut client, "query-commands")).unwrap();
    assert!(names.contains(&json!({ "name": "pmemsave" })));
}

#[test]
fn parameters_and_capabilities_are_kept_and_nonsense_is_named() {
    let kept = keep();
    let mut client = Client::connect(&kept.path).unwrap();
    client.execute("migrate-set-parameters", json!({ "max-bandwidth": 125_000_000, "downtime-limit": 50 })).unwrap();
    let parameters = ask(&mut client, "query-migrate-parameters");
    assert_eq!((&parameters["max-bandwidth"], &parameters["downtime-limit"]), (&json!(125_000_000), &json!(50)));
    let error = refusal(&mut client, "migrate-set-parameters", json!({ "max-bandwidth": 1, "warp": 9 }));
    assert!(error.contains("warp"), "{error}");
    assert_eq!(ask(&mut client, "query-migrate-parameters"), parameters);
    let wanted = json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] });
    client.execute("migrate-set-capabilities", wanted.clone()).unwrap();
    let capabilities = ask(&mut client, "query-migrate-capabilities");
    assert!(capabilities.as_array().unwrap().contains(&wanted["capabilities"][0]));
}

#[test]
fn a_machine_that_comes_in_is_told_of_and_keeps_others_out() {
    let kept = keep();
    let mut client = Client::connect(&kept.path).unwrap();
    assert_eq!(kept.handle.busy_with(), None);
    kept.handle.incoming_begins("tcp://10.0.0.1:5", Arc::new(Line::default()), Arc::default());
    assert!(kept.handle.busy_with().unwrap().contains("10.0.0.1"));
    kept.handle.incoming_phase(Phase::FirstPass);
    assert_eq!(ask(&mut client, "query-migrate"), json!({ "status": "active" }));
    kept.handle.incoming_failed("the link broke");
    assert_eq!([(); 3].map(|()| next_status(&mut client)), ["setup", "active", "failed"]);
    assert_eq!(kept.handle.busy_with(), None);
    assert_eq!(ask(&mut client, "query-migrate"), json!({}));
}

#[test]
fn whose_a_machine_is_that_comes_in_is_told_truly() {
    let kept = keep();
    let mut client = Client::connect(&kept.path).unwrap();
    kept.handle.incoming_begins("tcp://10.0.0.1:5", Arc::new(Line::default()), Arc::default());
    let mut says = |text: &str| {
        let refused = refusal(&mut client, "query-guest-ram", json!({}));
        assert!(refused.contains(text) && refused.contains("10.0.0.1"), "{refused}");
    };
    says("is coming in");
    kept.handle.incoming_phase(Phase::State);
    says("is coming in");
    kept.handle.incoming_phase(Phase::Commit);
    says("is being taken up");
    kept.handle.incoming_decision("the claim store does not answer");
    says("is not this process's yet: the claim store does not answer");
    kept.handle.incoming_phase(Phase::Completed);
    says("is being taken up");
}

#[test]
fn quit_hangs_up_on_a_move_that_can_still_be_called_off() {
    let kept = keep();
    let line = Arc::new(Line::default());
    kept.handle.incoming_begins("tcp://10.0.0.1:5", Arc::clone(&line) as Arc<dyn HangUp>, Arc::default());
    kept.handle.incoming_phase(Phase::Rounds);
    Client::connect(&kept.path).unwrap().execute("quit", json!({})).unwrap();
    let deadline = Instant::now() + LIMIT;
    while !line.0.load(Ordering::Acquire) {
        assert!(Instant::now() < deadline, "nobody hung up");
        thread::sleep(Duration::from_millis(1));
    }
    kept.handle.incoming_failed("hung up on");
    assert_eq!(kept.ended.join().unwrap(), End::Stopped(StopCause::Client));
    assert!(!kept.path.exists());
}

#[test]
fn quit_waits_for_the_end_of_a_handover_however_often_it_is_asked() {
    let kept = keep();
    let line = Arc::new(Line::default());
    kept.handle.incoming_begins("tcp://10.0.0.1:5", Arc::clone(&line) as Arc<dyn HangUp>, Arc::default());
    kept.handle.incoming_phase(Phase::State);
    let mut client = Client::connect(&kept.path).unwrap();
    for _ in 0..3 {
        ask(&mut client, "quit");
    }
    thread::sleep(Duration::from_millis(100));
    assert!(!kept.ended.is_finished() && !line.0.load(Ordering::Acquire));
    kept.handle.incoming_failed("the source took it back");
    assert_eq!(kept.ended.join().unwrap(), End::Stopped(StopCause::Client));
}

#[test]
fn the_last_events_are_delivered_before_the_end() {
    let kept = keep();
    let mut client = Client::connect(&kept.path).unwrap();
    ask(&mut client, "quit");
    let event = client.next_event(LIMIT).unwrap().unwrap();
    assert_eq!((event.name.as_str(), &event.data["guest"]), ("SHUTDOWN", &json!(false)));
    kept.ended.join().unwrap();
}
