//! The design's invariants, where other tests do not show them already.
//!
//! | invariant | shown by |
//! |---|---|
//! | 1, at most one host runs the guest | here; the model check (`ownership::model` in core), every reachable state; ownership.rs and faults.rs with real processes, before and after *commit* |
//! | 2, a failure before *commit* leaves the guest as it was | faults.rs, every phase; here: nothing slows it afterwards |
//! | 3, no byte that was written is lost | the guest's check and the audit after every move; here: over moves that came to nothing, each at another point |
//! | 4, what arrived is what was last sent | here: a bit that changed on the way is found, and so is a lost write |
//! | 5, nothing a peer sends harms | peers.rs |
//! | 6, every wait has a limit | the silent peers in peers.rs, the cut links in faults.rs, the stores that are away in ownership.rs |

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::clock::{monotonic_ns, ms};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::sampler::Sampler;
use godwit_tests::wait;
use godwit_tests::workload::{self, Workload};

const LIMIT: Duration = Duration::from_secs(60);
const TCP: &str = "tcp://127.0.0.1:0";

/// The byte of a channel that the bad wire changes: only a data channel carries as much, and there it is of a page that
/// is filled at boot and not sent again.
const CORRUPTED_BYTE: usize = 100_000_000;

/// Filled at boot, never written again.
const FILLED_PAGE: u64 = 100 << 20;

fn main() {
    let kvm = &[Need::Kvm];
    harness::main(vec![
        harness::test("invariant_1_at_most_one_host_runs_the_guest", kvm, at_most_one_host_runs_the_guest),
        harness::test("invariant_2_a_failed_move_does_not_slow_the_guest", kvm, a_failed_move_does_not_slow_the_guest),
        harness::test("invariant_3_dirty_bits_survive_every_retry", kvm, dirty_bits_survive_every_retry),
        harness::test(
            "invariant_4_a_bit_changed_on_the_way_ends_the_move",
            kvm,
            a_bit_changed_on_the_way_ends_the_move,
        ),
        harness::test("invariant_4_the_audit_finds_a_lost_write", kvm, the_audit_finds_a_lost_write),
    ])
}

fn at_most_one_host_runs_the_guest(scene: &Scene) -> Result<()> {
    let workload = Workload { vcpus: 2, ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let sampler = Sampler::start(source.heartbeats(workload.vcpus)?);
    let pid = destination.process.pid();
    let mut command = source.start_move(&destination.uri()?, &["--pause-before-switchover"])?;
    source.wait_for_phase("pre-switchover", LIMIT)?;
    let header = wait::until("the destination's memory", LIMIT, || Ok(workload::find_header(pid)))?;
    sampler.watch_destination(workload::heartbeats(pid, header, workload.vcpus));
    source.command(&["continue"], &[], LIMIT)?.ensure_code(0)?;
    Ended::wait(&mut command, LIMIT)?.ensure_moved(&destination, &workload)?;
    let gap = wait::until("the gap", LIMIT, || Ok(sampler.gap().ok()))?;
    ensure!(!sampler.both_ran(), "a vCPU ran at the destination before all had stopped at the source: {gap:?}");
    Ok(())
}

/// The page tables are compared before the destination may own the machine.
fn a_bit_changed_on_the_way_ends_the_move(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let uri = destination.uri()?;
    let address = uri.strip_prefix("tcp://").context("not a TCP URI")?;
    let bad_wire = corrupting_relay(address.to_owned())?;
    let ended = source.move_to(&format!("tcp://{bad_wire}"), &["--compress", "none", "--channels", "1"], LIMIT)?;
    ended.ensure_code(4)?.ensure_says(&["not what was sent"])?;
    source.ensure_guest_unharmed(&workload)?;
    // Over a good wire, to the same receiver.
    source.move_to(&uri, &[], LIMIT)?.ensure_moved(&destination, &workload).map(drop)
}

/// Hands connections on to `address` and flips one bit in a data channel, deep inside page contents.
fn corrupting_relay(address: String) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let own = listener.local_addr()?;
    thread::spawn(move || {
        for inward in listener.incoming().map_while(Result::ok) {
            let Ok(outward) = TcpStream::connect(&address) else { continue };
            let (Ok(back_in), Ok(back_out)) = (inward.try_clone(), outward.try_clone()) else { continue };
            thread::spawn(move || relay(inward, outward, Some(CORRUPTED_BYTE)));
            thread::spawn(move || relay(back_out, back_in, None));
        }
    });
    Ok(own)
}

fn relay(mut from: TcpStream, mut to: TcpStream, corrupt_at: Option<usize>) {
    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if let Some(at) = corrupt_at.and_then(|at| at.checked_sub(passed)).filter(|&at| at < length) {
            buffer[at] ^= 0x10;
        }
        passed += length;
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The other end learns of the end; if it has gone itself, there is nobody to tell.
    let _ = to.shutdown(Shutdown::Both);
}

/// A write that the dirty log misses: both ends agree on the stale page, and only the source's memory knows better.
fn the_audit_finds_a_lost_write(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let mut command = source.start_move(&destination.uri()?, &["--test-hold-at", "pause"])?;
    source.wait_for_phase("pause", LIMIT)?;
    // The page was sent in the first pass. KVM's log does not see what other processes write.
    flip_a_bit(&source.memory()?)?;
    source.command(&["release"], &[], LIMIT)?.ensure_code(0)?;
    let outcome = Ended::wait(&mut command, LIMIT)?.outcome()?;
    let audit = outcome["audit"].as_str().unwrap_or_default();
    ensure!(audit.starts_with("FAILED: 1 of"), "the audit did not find the lost write: {outcome}");
    destination.ensure_guest_whole(&workload)
}

/// Each try takes dirty bits that it does not get to send, at another point; the last one goes to another host. The guest writes flat out.
fn dirty_bits_survive_every_retry(scene: &Scene) -> Result<()> {
    const CHANNELS: [&str; 2] = ["--channels", "4"];
    // So slow that there are rounds to be in; and a limit that is not below what a pause takes on a busy machine with nothing left
    // to send, because then the move would be given up at once.
    const SLOW: [&str; 4] = ["--max-bandwidth", "2Gbit", "--downtime-limit", "20ms"];
    let workload = Workload { vcpus: 2, rate: "max", ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let first = Node::receiver(scene, "first", None, TCP, &[])?;
    // The receiver hears of the end a moment later than the sender.
    let listens_again =
        |before: usize| wait::until_true("the receiver listens again", LIMIT, || Ok(first.times_listening() > before));
    let cancelled_in = |phase: &str, options: &[&str]| -> Result<()> {
        let listening = first.times_listening();
        let before = source.migration()?["move"].as_u64();
        let mut command = source.start_move(&first.uri()?, &[&CHANNELS, options].concat())?;
        wait::until_true("the next try begins", LIMIT, || Ok(source.migration()?["move"].as_u64() > before))?;
        source.wait_for_phase(phase, LIMIT)?;
        source.command(&["cancel"], &[], LIMIT)?.ensure_code(0)?;
        Ended::wait(&mut command, LIMIT)?.ensure_code(5)?;
        listens_again(listening)?;
        source.ensure_guest_runs(workload.vcpus)
    };
    cancelled_in("first-pass", &SLOW)?;
    // A first round of about a second: after it, the move would be given up.
    cancelled_in("rounds", &["--max-bandwidth", "500Mbit", "--downtime-limit", "20ms", "--delta-cache", "0"])?;
    // It stalls.
    let stalls = [&CHANNELS[..], &SLOW, &["--max-rounds", "1"]].concat();
    let listening = first.times_listening();
    source.move_to(&first.uri()?, &stalls, LIMIT)?.ensure_code(4)?;
    listens_again(listening)?;
    // The last bits have been taken, and only some of their pages sent.
    for phase in ["final-pages", "state"] {
        cancelled_in(phase, &["--on-stall", "force", "--max-rounds", "1", "--test-hold-at", phase])?;
    }
    source.ensure_guest_unharmed(&workload)?;
    let second = Node::receiver(scene, "second", None, TCP, &[])?;
    let force = [&CHANNELS[..], &["--on-stall", "force", "--max-rounds", "2"]].concat();
    source.move_to(&second.uri()?, &force, LIMIT)?.ensure_moved(&second, &workload).map(drop)
}

/// With the dirty log or a throttle left on, a guest that writes flat out is several times slower.
fn a_failed_move_does_not_slow_the_guest(scene: &Scene) -> Result<()> {
    const SLOWEST_SHARE: f64 = 0.5;
    let workload = Workload { rate: "max", ..Workload::default() };
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, TCP, &[])?;
    let before = writes_per_ms(&source, &workload)?;
    let options = ["--max-bandwidth", "200Mbit", "--downtime-limit", "1ms", "--max-rounds", "1"];
    source.move_to(&destination.uri()?, &options, LIMIT)?.ensure_code(4)?;
    source.ensure_guest_whole(&workload)?;
    let after = writes_per_ms(&source, &workload)?;
    println!("writes per ms: {before:.0} before, {after:.0} after");
    ensure!(after > before * SLOWEST_SHARE, "{before:.0} writes per ms before the move, {after:.0} after");
    Ok(())
}

fn flip_a_bit(memory: &godwit_tests::guest_memory::RemoteMemory) -> Result<()> {
    let mut byte = [0];
    memory.read(FILLED_PAGE, &mut byte)?;
    memory.write(FILLED_PAGE, &[byte[0] ^ 1])
}

/// How fast the guest writes, over a while.
fn writes_per_ms(node: &Node, workload: &Workload) -> Result<f64> {
    const WINDOW_MS: f64 = 500.0;
    let target = workload::writes(node.heartbeats(workload.vcpus)?);
    let mut values = Vec::new();
    let mut total = || {
        target.read(&mut values).context("cannot read the guest's counters")?;
        Ok::<u64, anyhow::Error>(values.iter().sum())
    };
    let (start_ns, start) = (monotonic_ns(), total()?);
    wait::until("the window", LIMIT, || {
        let (taken_ms, now) = (ms(monotonic_ns() - start_ns), total()?);
        Ok((taken_ms >= WINDOW_MS).then(|| (now - start) as f64 / taken_ms))
    })
}
