//! How much memory a move takes at either end, beside the guest's own.
//!
//! | end | at most |
//! |---|---|
//! | receiver, all of it | what the guest has touched in units of 2 MiB + the page table + 64 MiB |
//! | sender, without the guest's RAM | the page table + the delta cache + 64 MiB |

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::footprint::{guest_bytes, peak_bytes, touched_bytes};
use godwit_tests::godwit::{Ended, Node};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::workload::Workload;

const LIMIT: Duration = Duration::from_secs(120);

/// How often it is looked how much the sender has: its process ends with the move.
const LOOK_GAP: Duration = Duration::from_millis(2);

const MIB: u64 = 1 << 20;

/// For programs, libraries, stacks, buffers.
const ROOM_BYTES: u64 = 64 * MIB;

/// Bytes that each end keeps for a page.
const TABLE_ENTRY_BYTES: u64 = 8;

/// Much more than the room, both in the first pass and in what is written again and again.
const WORKLOAD: Workload = Workload {
    memory: "768M",
    vcpus: 1,
    fill: "320M",
    working_set: "128M",
    rate: "20000",
    order: "random",
    write: "word",
    contents: "random",
    seed: 31,
};

const COMPRESSIBLE: Workload = Workload { contents: "compressible", ..WORKLOAD };

/// Written slowly enough for rounds to end under a cap.
const CALM: Workload = Workload { rate: "4000", working_set: "96M", ..WORKLOAD };

const TCP: &str = "tcp://127.0.0.1:0";
const QUIC: &str = "quic://127.0.0.1:0";

fn main() {
    // A busy host looks like a slow link for a moment, and the cache begins to fill.
    let without = ["--delta-cache", "0"];
    let cap = ["--max-bandwidth", "1Gbit"];
    let capped = [cap, without].concat();
    let case = |name: &str, listen: &'static str, workload: &'static Workload, options: &[&'static str]| {
        let options = options.to_vec();
        harness::test(name, &[Need::Kvm], move |scene| bounded(scene, listen, workload, &options, 0))
    };
    harness::main(vec![
        case("tcp", TCP, &WORKLOAD, &without),
        case("tcp_4_channels", TCP, &WORKLOAD, &[&["--channels", "4"], &without[..]].concat()),
        case("quic", QUIC, &WORKLOAD, &without),
        case("quic_3_channels", QUIC, &WORKLOAD, &[&["--channels", "3"], &without[..]].concat()),
        case("compressed", TCP, &COMPRESSIBLE, &[&["--compress", "zstd"], &without[..]].concat()),
        case("tcp_capped", TCP, &CALM, &capped),
        case("quic_capped", QUIC, &CALM, &capped),
        harness::test("differences", &[Need::Kvm], move |scene| {
            bounded(scene, TCP, &CALM, &[&cap[..], &["--delta-cache", "64M"]].concat(), 64 * MIB)
        }),
    ])
}

fn bounded(scene: &Scene, listen: &str, workload: &Workload, options: &[&str], cache_bytes: u64) -> Result<()> {
    let source = Node::sender(scene, "source", None, workload, &[])?;
    let destination = Node::receiver(scene, "destination", None, listen, &[])?;
    let (pid, memory) = (source.process.pid(), source.memory()?);
    let (touched, guest) = (touched_bytes(pid, &memory)?, guest_bytes(pid, &memory)?);
    ensure!(guest > 300 * MIB && touched >= guest, "{guest} bytes of guest RAM are resident, {touched} touched");

    let mut command = source.start_move(
        &destination.uri()?,
        &[&["--switchover-bandwidth", "500Mbit", "--downtime-limit", "50ms"], options].concat(),
    )?;
    let mut sender = peak_bytes(pid)?;
    while command.is_running()? {
        sender = peak_bytes(pid).unwrap_or(sender);
        thread::sleep(LOOK_GAP);
    }
    let outcome = Ended::wait(&mut command, LIMIT)?.ensure_audited()?;
    ensure!(outcome["rounds"].as_u64() >= Some(1), "no round was tested: {outcome}");
    let receiver = peak_bytes(destination.process.pid())?;
    destination.ensure_guest_whole(workload)?;

    let table = workload.pages() * TABLE_ENTRY_BYTES;
    let own = sender - guest;
    let (sender_bound, receiver_bound) = (table + cache_bytes + ROOM_BYTES, touched + table + ROOM_BYTES);
    eprintln!(
        "sender's own {} of {} MiB; receiver {} of {} MiB, {} beside the guest's {}",
        own / MIB,
        sender_bound / MIB,
        receiver / MIB,
        receiver_bound / MIB,
        (receiver.saturating_sub(touched)) / MIB,
        touched / MIB
    );
    ensure!(own <= sender_bound, "the sender has taken {own} bytes for itself, more than {sender_bound}");
    ensure!(receiver <= receiver_bound, "the receiver has taken {receiver} bytes, more than {receiver_bound}");
    Ok(())
}
