//! Destinations that refuse or cannot, and peers that are not ours.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::*;

/// Refuses, or cannot build, or has memory that is not what it should be.
struct Bad(&'static str);

impl DestinationHost for Bad {
    type Machine = ToyMachine;

    fn check(&mut self, _: &MachineDescription, _: &[u8]) -> Verdict {
        match self.0 {
            "check" => vec![Refusal::new("cpu", "no avx"), Refusal::new("memory", "too large")].into(),
            _ => Verdict::default(),
        }
    }

    fn prepare(&mut self, _: &MachineDescription) -> Result<ToyMachine, MachineError> {
        match self.0 {
            "prepare" => Err(MachineError::new("no room for the machine")),
            _ => ToyMachine::new(),
        }
    }
}

#[test]
fn every_reason_for_a_refusal_reaches_the_user() {
    let machine = running_machine();
    let destination = Destination::with_host(DestinationOptions::default(), Bad("check"));
    let outcome = start(&machine, &destination, options()).wait();
    let SourceOutcome::Refused(refusals) = &*outcome else { panic!("{outcome:?}") };
    assert_eq!(refusals.iter().map(|refusal| &*refusal.subject).collect::<Vec<_>>(), ["cpu", "memory"]);
    assert_runs_on(&machine);
}

#[test]
fn why_the_destination_cannot_build_the_machine_reaches_the_user() {
    let machine = running_machine();
    let destination = Destination::with_host(DestinationOptions::default(), Bad("prepare"));
    let outcome = start(&machine, &destination, options()).wait();
    assert!(
        matches!(&*outcome, SourceOutcome::Failed(why, _) if why.contains("no room for the machine")),
        "{outcome:?}"
    );
    assert_runs_on(&machine);
}

#[test]
fn invariant_5_peers_that_are_not_ours_are_survived() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let uri: Uri = format!("unix:{}", path.display()).parse().unwrap();
    let listener = godwit_transport::listen(&uri, Options::default()).unwrap();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"x"] {
        UnixStream::connect(&path).unwrap().write_all(garbage).unwrap();
    }
    // A peer that knows the transport but then talks nonsense on its control channel.
    for frame in [
        &b"GWCT\x01\x00\x00\x00\xff\xff\xff\xff\0\0\0\0"[..],
        b"GWCT\x63\x00\x00\x00\x00\x00\x00\x00\0\0\0\0",
        &[7; 64],
    ] {
        let mut channel = godwit_transport::connect(&uri, Options::default()).unwrap().control(LIMIT).unwrap();
        channel.writer.write_all(frame).unwrap();
        let control = listener.next_control(LIMIT).unwrap().expect("a peer");
        let outcome = receive(
            control,
            &mut listener.incoming_data(),
            &mut ToyHost,
            &DestinationOptions::default(),
            Arc::new(Silent),
        );
        assert!(matches!(outcome, DestinationOutcome::Ended(_)));
    }
    let machine = running_machine();
    let dial = godwit_transport::connect(&uri, Options::default()).unwrap();
    let migration = SourceMigration::start(Arc::clone(&machine) as _, dial, options(), Arc::new(Silent));
    let control = listener.next_control(LIMIT).unwrap().expect("a peer");
    let mut data = listener.incoming_data();
    let outcome = receive(control, &mut data, &mut ToyHost, &DestinationOptions::default(), Arc::new(Silent));
    assert!(matches!(outcome, DestinationOutcome::Owned { .. }));
    assert!(matches!(&*migration.wait(), SourceOutcome::Moved(_)));
}

#[test]
fn a_peer_that_is_turned_away_hears_why() {
    let directory = tempfile::tempdir().unwrap();
    let uri: Uri = format!("unix:{}", directory.path().join("socket").display()).parse().unwrap();
    let listener = godwit_transport::listen(&uri, Options::default()).unwrap();
    let dial = godwit_transport::connect(&uri, Options::default()).unwrap();
    let machine = running_machine();
    let migration = SourceMigration::start(Arc::clone(&machine) as _, dial, options(), Arc::new(Silent));
    refuse(listener.next_control(LIMIT).unwrap().expect("a peer"), "fw1 is moving in");
    let outcome = migration.wait();
    let SourceOutcome::Refused(refusals) = &*outcome else { panic!("{outcome:?}") };
    assert!(refusals[0].reason.contains("fw1 is moving in"), "{refusals:?}");
    assert_runs_on(&machine);
}
