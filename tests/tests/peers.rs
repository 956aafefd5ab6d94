//! Peers that are not ours: a receiver tells them off, goes on listening, and then takes a machine in.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::wait;
use godwit_tests::workload::Workload;
use godwit_transport::Options;

/// Longer than every limit on a silent peer.
const LIMIT: Duration = Duration::from_secs(40);

const TCP: &str = "tcp://127.0.0.1:0";

fn main() {
    let test = |name: &'static str, run: fn(&Scene, &Node) -> Result<()>| {
        harness::test(name, &[Need::Kvm], move |scene| and_then_a_good_move(scene, run))
    };
    harness::main(vec![
        test("random_bytes", |_, receiver| turned_away(receiver, &noise(64 << 10))),
        test("http", |_, receiver| turned_away(receiver, b"GET / HTTP/1.1\r\nHost: godwit\r\n\r\n")),
        test("a_few_bytes_and_the_end", |_, receiver| turned_away(receiver, b"God")),
        test("connects_and_says_nothing", |_, receiver| turned_away(receiver, b"")),
        test("a_hundred_at_once", |_, receiver| a_hundred_at_once(receiver)),
        test("noise_after_a_good_preamble", |_, receiver| after_preamble(receiver, &noise(64 << 10))),
        test("zeros_after_a_good_preamble", |_, receiver| after_preamble(receiver, &[0; 4096])),
        test("ones_after_a_good_preamble", |_, receiver| after_preamble(receiver, &[0xff; 4096])),
        test("an_oversized_length", |_, receiver| after_preamble(receiver, &frame(u32::MAX, &[0; 4096]))),
        test("a_truncated_message", |_, receiver| after_preamble(receiver, &frame(200, &[0; 100]))),
        test("silence_after_a_good_preamble", |_, receiver| after_preamble(receiver, b"")),
        test("the_end_after_a_good_preamble", |_, receiver| the_end_after_a_good_preamble(receiver)),
        harness::test("a_second_sender_is_refused_by_name", &[Need::Kvm], a_second_sender_is_refused_by_name),
        harness::test("quic_noise", &[Need::Kvm], quic_noise),
    ])
}

fn and_then_a_good_move(scene: &Scene, stranger: fn(&Scene, &Node) -> Result<()>) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let mut receiver = Node::receiver(scene, "receiver", None, TCP, &[])?;
    stranger(scene, &receiver)?;
    ensure!(receiver.process.is_running()?, "the receiver has ended");
    source.move_to(&receiver.uri()?, &[], LIMIT)?.ensure_moved(&receiver, &workload).map(drop)
}

/// Bytes without meaning, always the same.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn connect(receiver: &Node) -> Result<TcpStream> {
    let uri = receiver.uri()?;
    let address = uri.strip_prefix("tcp://").context("not a TCP URI")?;
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// The receiver hangs up within the limit, whatever it says before.
fn ensure_hung_up(stream: &mut impl Read) -> Result<()> {
    let mut answer = Vec::new();
    match stream.take(1 << 20).read_to_end(&mut answer) {
        Ok(length) => ensure!(length < 1 << 20, "the receiver talks without end"),
        Err(error) => {
            let silent = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            ensure!(!silent, "the receiver did not hang up within {LIMIT:?}");
        }
    }
    Ok(())
}

fn turned_away(receiver: &Node, bytes: &[u8]) -> Result<()> {
    let mut stream = connect(receiver)?;
    // It may hang up before it has heard everything.
    let _ = stream.write_all(bytes);
    ensure_hung_up(&mut stream)
}

fn a_hundred_at_once(receiver: &Node) -> Result<()> {
    let streams: Vec<TcpStream> = (0..100).map(|_| connect(receiver)).collect::<Result<_>>()?;
    drop(streams);
    Ok(())
}

/// A peer that speaks the transport's language but not the engine's.
fn after_preamble(receiver: &Node, bytes: &[u8]) -> Result<()> {
    let mut channel = dial(receiver)?;
    let _ = channel.writer.write_all(bytes);
    let mut answer = [0; 4096];
    wait::until_true("the receiver listens again", LIMIT, || Ok(listens_again(receiver)))?;
    // What it said, if anything, and then the end.
    while matches!(channel.reader.read(&mut answer), Ok(length) if length > 0) {}
    Ok(())
}

/// The beginning of a control message as docs/protocol.md has it: a *hello* that claims to be this long.
fn frame(length: u32, payload: &[u8]) -> Vec<u8> {
    let checksum = 0u32;
    [b"GWCT", &1u16.to_le_bytes()[..], &[0; 2], &length.to_le_bytes(), &checksum.to_le_bytes(), payload].concat()
}

fn the_end_after_a_good_preamble(receiver: &Node) -> Result<()> {
    drop(dial(receiver)?);
    wait::until_true("the receiver listens again", LIMIT, || Ok(listens_again(receiver)))
}

fn dial(receiver: &Node) -> Result<godwit_core::Channel> {
    let uri = receiver.uri()?.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    let dial = godwit_transport::connect(&uri, Options::default())?;
    Ok(dial.control(LIMIT)?)
}

fn listens_again(receiver: &Node) -> bool {
    receiver.process.stderr().contains("listening again")
}

fn a_second_sender_is_refused_by_name(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let first = Node::sender(scene, "first", None, &workload, &[])?;
    let second = Node::sender(scene, "second", None, &Workload { seed: 2, ..workload.clone() }, &[])?;
    let receiver = Node::receiver(scene, "receiver", None, TCP, &["--host-id", "the-receiving-host"])?;
    let uri = receiver.uri()?;
    let mut command = first.start_move(&uri, &["--pause-before-switchover"])?;
    first.wait_for_phase("pre-switchover", LIMIT)?;
    let refused = second.move_to(&uri, &[], LIMIT)?.ensure_says(&["the-receiving-host"])?;
    ensure!([3, 4].contains(&refused.code), "{refused}");
    second.ensure_guest_unharmed(&workload)?;
    first.command(&["continue"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&receiver, &workload)?;
    // And now that it has a machine.
    let refused = second.move_to(&uri, &[], LIMIT)?.ensure_says(&["the-receiving-host"])?;
    ensure!([3, 4].contains(&refused.code), "{refused}");
    second.ensure_guest_unharmed(&workload)
}

fn quic_noise(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let receiver = Node::receiver(scene, "receiver", None, "quic://127.0.0.1:0", &[])?;
    let uri = receiver.uri()?;
    let address = uri.strip_prefix("quic://").and_then(|rest| rest.split('?').next()).context("not a QUIC URI")?;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    for length in [1, 20, 1200, 1472] {
        socket.send_to(&noise(length), address)?;
    }
    source.move_to(&uri, &[], LIMIT)?.ensure_moved(&receiver, &workload).map(drop)
}
