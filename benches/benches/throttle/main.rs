//! Holding a guest to a rate of writing: by duty cycle, as the product does it, or by KVM's dirty ring. Which disturbs less?
//!
//! `cargo bench --bench throttle [-- --json]`. Needs /dev/kvm, and a machine with nothing else to do. docs/convergence.md has what came out.

// Not a library: nobody reads its documentation.
#![allow(missing_docs)]

mod holding;
mod ring_machine;
mod subject;
mod watching;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use godwit_vmm::workload::{Order, Rate, WriteUnit, WriterConfig};
use serde_json::{Value, json};

use self::subject::{Subject, Way};
use self::watching::{Seen, percentile, watch, writes};

const MEMORY_BYTES: u64 = 320 << 20;
/// As many pages as the largest ring has entries: it is full before a page is written again.
const WORKING_SET_BYTES: u64 = 256 << 20;

/// How long a guest may take to boot and to write everything once.
const PATIENCE: Duration = Duration::from_secs(30);

/// After a change of rate, until it is measured.
const SETTLING: Duration = Duration::from_millis(400);

/// No measurement takes longer, however long a vCPU rests.
const LONGEST: Duration = Duration::from_secs(10);

/// Rests and runs that a measurement should see.
const CYCLES: f64 = 2.5;

#[derive(Parser)]
struct Arguments {
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
    /// vCPUs of the guest: the first writes, the others only read
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    vcpus: Vec<u32>,
    /// Shares of its full rate that the writer is left
    #[arg(long, value_delimiter = ',', default_value = "0.5,0.2,0.1,0.05")]
    shares: Vec<f64>,
    /// Entries of the rings
    #[arg(long, value_delimiter = ',', default_value = "1024,4096,16384,65536")]
    rings: Vec<usize>,
    /// Ways to hold it
    #[arg(long, value_enum, value_delimiter = ',', default_value = "duty-cycle,look,full")]
    ways: Vec<WayName>,
    /// Seconds that each is measured for, at least
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// How often each is measured: what counts is the time when the host had least to do besides
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    /// Measure next to nothing
    #[arg(long)]
    test: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// In which way the writer is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WayName {
    /// The product's duty cycle, over the dirty bitmap
    DutyCycle,
    /// A look at its ring every millisecond; the largest of the rings
    Look,
    /// When its ring is full; each of the rings
    Full,
}

fn main() -> Result<()> {
    let mut arguments = Arguments::parse();
    if !Path::new("/dev/kvm").exists() {
        eprintln!("/dev/kvm is missing: nothing is measured");
        return Ok(());
    }
    if arguments.test {
        (arguments.shares, arguments.rings) = (vec![0.2], vec![1024]);
        (arguments.seconds, arguments.repeat) = (0.1, 1);
    }
    let rings = &arguments.rings;
    let ways = arguments.ways.iter().flat_map(|way| match way {
        WayName::DutyCycle => vec![Way::DutyCycle],
        WayName::Look => rings.iter().max().map(|entries| Way::RingMetered(*entries)).into_iter().collect(),
        WayName::Full => rings.iter().map(|entries| Way::RingFull(*entries)).collect(),
    });
    let mut results = Vec::new();
    for way in ways {
        for vcpus in &arguments.vcpus {
            results.push(measure(way, *vcpus, &arguments)?);
        }
    }
    if arguments.json {
        println!("{}", json!({ "throttle": results }));
    }
    Ok(())
}

/// All shares in one way.
fn measure(way: Way, vcpus: u32, arguments: &Arguments) -> Result<Value> {
    let writer = WriterConfig {
        working_set_bytes: WORKING_SET_BYTES,
        fill_bytes: WORKING_SET_BYTES,
        rate: Rate::Max,
        order: Order::Seq,
        write: WriteUnit::Page,
        writers: 1,
        ..WriterConfig::default()
    };
    let time = Duration::from_secs_f64(arguments.seconds);
    let mut subject = way.boot(MEMORY_BYTES, &writer, vcpus)?;
    let memory = subject.memory();
    wait_for_writes(subject.as_ref(), WORKING_SET_BYTES / 4096)?;
    let alone = least_disturbed(arguments.repeat, || {
        let seen = watch(&memory, time / 2);
        Ok((seen.waited, seen))
    })?;
    subject.start_log()?;
    let logged = least_disturbed(arguments.repeat, || {
        let held = held(subject.as_ref(), 1.0, 0.0, time / 2);
        Ok((held.seen.waited, held))
    })?;
    eprintln!(
        "\n{}, {vcpus} vCPU: {:.0} pages/s, with its log {:.0}; longest standstill {:.2} ms\n{:>6} {:>9} {:>8} {:>11} {:>11} {:>7} {:>9} {:>9} {:>7}",
        name(way),
        alone.pages_per_s,
        logged.seen.pages_per_s,
        millis(longest(&logged.seen)),
        "share",
        "wanted/s",
        "reached",
        "longest ms",
        "p99 ms",
        "reader",
        "CPU hold",
        "CPU log",
        "waited"
    );
    let mut cases = Vec::new();
    for share in &arguments.shares {
        let (wanted, Held { seen, holding, tracking }) = least_disturbed(arguments.repeat, || {
            // Its full rate right now: the host may have other things to do than a moment ago.
            let full = held(subject.as_ref(), 1.0, 0.0, time / 2).seen;
            ensure!(full.pages_per_s > 0.0, "the guest does not write: the host is too busy to measure anything");
            let wanted = share * full.pages_per_s;
            let cycle = match way {
                Way::RingFull(entries) => entries as f64 / wanted,
                Way::RingMetered(_) | Way::DutyCycle => 0.0,
            };
            let time = time.max(Duration::from_secs_f64(CYCLES * cycle)).min(LONGEST.max(time));
            let held = held(subject.as_ref(), *share, full.pages_per_s, time);
            // A writer that is held wants to run for a share of the time only.
            Ok((full.waited.max(held.seen.waited / share), (wanted, held)))
        })?;
        let reader = (vcpus > 1).then(|| seen.reader_beats_per_s / alone.reader_beats_per_s);
        let (reached, p99) = (seen.pages_per_s / wanted, percentile(&seen.standstills, 0.99));
        eprintln!(
            "{share:>6} {wanted:>9.0} {reached:>8.2} {:>11.2} {:>11.2} {:>7} {:>7.2} % {:>7.2} % {:>5.1} %",
            millis(longest(&seen)),
            millis(p99),
            reader.map_or("-".into(), |share| format!("{share:.2}")),
            100.0 * holding,
            100.0 * tracking,
            100.0 * seen.waited
        );
        cases.push(json!({
            "share": share,
            "wanted_pages_per_s": wanted,
            "reached_of_wanted": reached,
            "standstill_longest_ms": millis(longest(&seen)),
            "standstill_p99_ms": millis(p99),
            "standstills": seen.standstills.len(),
            "reader_share": reader,
            "holding_cpu_pct": 100.0 * holding,
            "tracking_cpu_pct": 100.0 * tracking,
            "waited_pct": 100.0 * seen.waited,
            "sample_interval_p99_ms": millis(seen.sample_interval_p99),
        }));
    }
    Ok(json!({
        "way": name(way),
        "vcpus": vcpus,
        "untracked_pages_per_s": alone.pages_per_s,
        "tracked_pages_per_s": logged.seen.pages_per_s,
        "tracked_standstill_longest_ms": millis(longest(&logged.seen)),
        "cases": cases,
    }))
}

/// The measurement during which the writer waited least for a CPU that others had. `measure` says how much that was.
fn least_disturbed<T>(times: u32, mut measure: impl FnMut() -> Result<(f64, T)>) -> Result<T> {
    let mut best = measure()?;
    for _ in 1..times {
        let next = measure()?;
        if next.0 < best.0 {
            best = next;
        }
    }
    Ok(best.1)
}

/// A guest that is held, seen for a while.
struct Held {
    seen: Seen,
    /// Shares of one CPU that were spent on holding it, and on tracking what it writes.
    holding: f64,
    tracking: f64,
}

fn held(subject: &dyn Subject, share: f64, full_pages_per_s: f64, time: Duration) -> Held {
    subject.hold(share, full_pages_per_s);
    thread::sleep(SETTLING);
    let (start, before) = (Instant::now(), subject.spent());
    let seen = watch(&subject.memory(), time);
    let (took, after) = (start.elapsed().as_secs_f64(), subject.spent());
    let of_one_cpu = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() / took;
    Held { seen, holding: of_one_cpu(before.0, after.0), tracking: of_one_cpu(before.1, after.1) }
}

fn wait_for_writes(subject: &dyn Subject, pages: u64) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while writes(&subject.memory()) < pages {
        ensure!(Instant::now() < until, "the guest does not write");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn name(way: Way) -> String {
    match way {
        Way::DutyCycle => "duty cycle".into(),
        Way::RingFull(entries) => format!("full ring of {entries}"),
        Way::RingMetered(entries) => format!("look at ring of {entries}"),
    }
}

fn longest(seen: &Seen) -> Duration {
    seen.standstills.last().copied().unwrap_or_default()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
