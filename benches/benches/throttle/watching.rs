//! What a guest does, seen from outside: how much it writes, and how long it stands still.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use godwit_core::GuestMemory;
use godwit_vmm::workload::layout::{HEADER, VCPU_LINE_BYTES, field, line};
use vm_memory::{Bytes, GuestAddress};

/// Between two looks.
const SAMPLE_INTERVAL: Duration = Duration::from_micros(40);

/// A heartbeat that does not change for so long has stopped. (It advances every microsecond or so, a fault takes a few.)
const STANDSTILL: Duration = Duration::from_micros(100);

/// The vCPU that writes, and the one that does not.
pub const WRITER: u64 = 0;
pub const READER: u64 = 1;

/// What their threads are called.
const WRITER_THREAD: &str = "vcpu0";
const READER_THREAD: &str = "vcpu1";

/// What was seen in a while.
pub struct Seen {
    /// Pages that the writer wrote in a second.
    pub pages_per_s: f64,
    /// Heartbeats of the reader in a second, not counting the time in which it waited for a CPU that others had.
    pub reader_beats_per_s: f64,
    /// How long the writer stood still, each time, shortest first.
    pub standstills: Vec<Duration>,
    /// Between two looks, 99 % of the time.
    pub sample_interval_p99: Duration,
    /// Share of the time in which the writer's thread wanted to run and did not.
    pub waited: f64,
}

/// Watches a guest for a while.
pub fn watch(memory: &GuestMemory, time: Duration) -> Seen {
    thread::scope(|scope| match scope.spawn(|| sample(memory, time)).join() {
        Ok(seen) => seen,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn sample(memory: &GuestMemory, time: Duration) -> Seen {
    look_sharp();
    let start = Instant::now();
    let (writer_waited, reader_waited) = (waited(WRITER_THREAD), waited(READER_THREAD));
    let reader_before = counter(memory, READER, line::HEARTBEAT);
    // Pages written, and when: a throttled vCPU is counted from the end of one rest to that of another.
    let mut first = (start, counter(memory, WRITER, line::WRITES));
    let (mut last, mut ends) = (first, 0);
    let (mut standstills, mut intervals) = (Vec::new(), Vec::new());
    let (mut beat, mut changed, mut looked) = (counter(memory, WRITER, line::HEARTBEAT), start, start);
    while looked - start < time {
        thread::sleep(SAMPLE_INTERVAL);
        let now = Instant::now();
        intervals.push(now - looked);
        looked = now;
        let found = counter(memory, WRITER, line::HEARTBEAT);
        if found == beat {
            continue;
        }
        if now - changed >= STANDSTILL {
            standstills.push(now - changed);
            last = (now, counter(memory, WRITER, line::WRITES));
            if ends == 0 {
                first = last;
            }
            ends += 1;
        }
        (beat, changed) = (found, now);
    }
    if looked - changed >= STANDSTILL {
        standstills.push(looked - changed);
    }
    if ends < 2 {
        last = (looked, counter(memory, WRITER, line::WRITES));
    }
    let took = start.elapsed();
    let reader_beats = counter(memory, READER, line::HEARTBEAT) - reader_before;
    let writer_waited = waited(WRITER_THREAD).saturating_sub(writer_waited);
    let reader_waited = waited(READER_THREAD).saturating_sub(reader_waited);
    standstills.sort();
    intervals.sort();
    Seen {
        pages_per_s: (last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64(),
        reader_beats_per_s: reader_beats as f64 / (took - reader_waited).as_secs_f64(),
        standstills,
        sample_interval_p99: percentile(&intervals, 0.99),
        waited: writer_waited.as_secs_f64() / took.as_secs_f64(),
    }
}

/// One of so many sorted values; zero if there are none.
pub fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// Pages that the writer has written so far.
pub fn writes(memory: &GuestMemory) -> u64 {
    counter(memory, WRITER, line::WRITES)
}

fn counter(memory: &GuestMemory, vcpu: u64, offset: u64) -> u64 {
    let address = HEADER + field::VCPU_LINES + vcpu * VCPU_LINE_BYTES + offset;
    memory.read_obj(GuestAddress(address)).expect("the header page is RAM")
}

/// This thread shall run when it wants to, and wake up when it said.
fn look_sharp() {
    // SAFETY: both calls take numbers only, and are about the calling thread. Without the right to it the thread stays as it is.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, -20);
        libc::prctl(libc::PR_SET_TIMERSLACK, 1);
    }
}

/// The time that this thread has been on a CPU.
pub fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The time that threads of this process with this name have been on a CPU.
pub fn cpu_time_of(name: &str) -> Duration {
    threads().into_iter().filter(|(found, ..)| found == name).map(|(_, ran, _)| ran).sum()
}

/// The time that threads with this name have waited for a CPU because others had it.
fn waited(name: &str) -> Duration {
    threads().into_iter().filter(|(found, ..)| found == name).map(|(.., waited)| waited).sum()
}

/// The threads of this process: name, time on a CPU, time in which it waited for one.
fn threads() -> Vec<(String, Duration, Duration)> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let of_task = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned();
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let mut times = times.split_whitespace().flat_map(str::parse).map(Duration::from_nanos);
        Some((name, times.next()?, times.next()?))
    };
    // A thread may end while it is looked at.
    tasks.flatten().filter_map(of_task).collect()
}
