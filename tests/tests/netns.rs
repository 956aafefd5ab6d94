//! The tests' own network: links carry, count, slow down and break as the other tests rely on.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use godwit_tests::counters::{TCP_HEADER_BYTES, Traffic, UDP_HEADER_BYTES};
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::netns::{Hosts, Namespace};
use godwit_tests::process::Process;
use godwit_tests::wait;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

fn main() {
    harness::main(vec![
        harness::test("links_carry_and_count", &[Need::Root], |_| links_carry_and_count()),
        harness::test("datagrams_are_counted_exactly", &[Need::Root], |_| datagrams_are_counted_exactly()),
        harness::test("a_shaped_link_is_slow", &[Need::Root], |_| a_shaped_link_is_slow()),
        harness::test("a_cut_link_loses_everything_until_mended", &[Need::Root], |_| a_cut_link_is_silent()),
        harness::test("nothing_is_left_behind", &[Need::Root], |_| nothing_is_left_behind()),
        harness::test("an_interrupted_run_leaves_nothing_behind", &[Need::Root, Need::Kvm], an_interrupted_run),
    ])
}

const PAYLOAD_BYTES: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// Runs `work` on a thread inside a namespace.
fn inside<T: Send + 'static>(
    host: &Namespace,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<thread::JoinHandle<Result<T>>> {
    let namespace = host.open()?;
    Ok(thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        work()
    }))
}

/// Sends [`PAYLOAD_BYTES`] over TCP from host 0 to host 1 and gives how long that took.
fn send(hosts: &Hosts) -> Result<Duration> {
    let address = format!("{}:7000", hosts.address(1, 0));
    let (ready, is_ready) = std::sync::mpsc::channel();
    let receiver = inside(hosts.host(1), {
        let address = address.clone();
        move || {
            let listener = TcpListener::bind(address)?;
            ready.send(())?;
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut received = Vec::new();
            stream.read_to_end(&mut received)?;
            Ok(received.len())
        }
    })?;
    is_ready.recv_timeout(LIMIT)?;
    let start = Instant::now();
    let sender = inside(hosts.host(0), move || {
        let mut stream = TcpStream::connect_timeout(&address.parse()?, LIMIT)?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream.write_all(&vec![1; PAYLOAD_BYTES])?)
    })?;
    sender.join().map_err(|_| anyhow!("sender panicked"))??;
    let received = receiver.join().map_err(|_| anyhow!("receiver panicked"))??;
    ensure!(received == PAYLOAD_BYTES, "{received} bytes received");
    Ok(start.elapsed())
}

fn links_carry_and_count() -> Result<()> {
    let hosts = Hosts::new(3)?;
    let counters = hosts.counters(0, 1)?;
    let before = counters.traffic()?;
    send(&hosts)?;
    let payload = payload(before, counters.traffic()?, TCP_HEADER_BYTES);
    // The handshake's options are longer, address resolution is shorter, and TCP may have sent some of it twice.
    let expected = PAYLOAD_BYTES as i64 - 200..PAYLOAD_BYTES as i64 * 3 / 2;
    ensure!(expected.contains(&payload), "{payload} bytes of payload by the counters, {PAYLOAD_BYTES} sent");
    ensure!(hosts.counters(0, 2)?.traffic()?.sent_bytes < 10_000, "the link to the third host carried it");
    Ok(())
}

/// Nothing is sent twice over UDP, so a header of another length would show.
fn datagrams_are_counted_exactly() -> Result<()> {
    /// What little the hosts say by themselves when a link comes up.
    const CHATTER_BYTES: u64 = 400;
    const DATAGRAMS: usize = 200;
    const BYTES: usize = 1200;
    let hosts = Hosts::new(2)?;
    let counters = hosts.counters(0, 1)?;
    let before = counters.traffic()?;
    let address = format!("{}:7000", hosts.address(1, 0));
    let sender = inside(hosts.host(0), move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..DATAGRAMS {
            socket.send_to(&[7; BYTES], &address)?;
        }
        Ok(())
    })?;
    sender.join().map_err(|_| anyhow!("sender panicked"))??;
    let payload = payload(before, counters.traffic()?, UDP_HEADER_BYTES);
    let sent = (DATAGRAMS * BYTES) as i64;
    ensure!(payload.abs_diff(sent) < CHATTER_BYTES, "{payload} bytes of payload by the counters, {sent} sent");
    Ok(())
}

fn payload(before: Traffic, after: Traffic, header_bytes: u64) -> i64 {
    let packets = after.sent_packets - before.sent_packets;
    (after.sent_bytes - before.sent_bytes) as i64 - (packets * header_bytes) as i64
}

fn a_shaped_link_is_slow() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let before = hosts.counters(0, 1)?.traffic()?;
    hosts.shape(0, 1, 100)?;
    let took = send(&hosts)?;
    let ideal = Duration::from_secs_f64(PAYLOAD_BYTES as f64 * 8.0 / 100e6);
    ensure!(took > ideal.mul_f64(0.8) && took < ideal.mul_f64(2.0), "{took:?}, ideally {ideal:?}");
    let after = hosts.counters(0, 1)?.traffic()?;
    let payload = payload(before, after, TCP_HEADER_BYTES).unsigned_abs();
    ensure!(payload.abs_diff(PAYLOAD_BYTES as u64) < PAYLOAD_BYTES as u64 / 10, "payload counted: {payload}");
    Ok(())
}

fn a_cut_link_is_silent() -> Result<()> {
    let hosts = Hosts::new(2)?;
    send(&hosts)?;
    hosts.cut(0, 1)?;
    let address = format!("{}:7000", hosts.address(1, 0));
    let attempt = inside(hosts.host(0), move || {
        Ok(TcpStream::connect_timeout(&address.parse()?, Duration::from_millis(300)).map_err(|error| error.kind()))
    })?;
    let kind = attempt.join().map_err(|_| anyhow!("panicked"))??.err();
    ensure!(kind == Some(std::io::ErrorKind::TimedOut), "expected silence, got {kind:?}");
    hosts.mend(0, 1)?;
    send(&hosts).context("after mending")?;
    hosts.take_down(0, 1)?;
    hosts.bring_up(0, 1)?;
    send(&hosts).context("after down and up").map(drop)
}

fn nothing_is_left_behind() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let path = hosts.host(1).path();
    ensure!(path.exists());
    drop(hosts);
    ensure!(!path.exists());

    let hosts = Hosts::new(2)?;
    let path = hosts.host(1).path();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _hosts = hosts;
        std::panic::resume_unwind(Box::new("on purpose"));
    }));
    ensure!(unwound.is_err() && !path.exists());
    Ok(())
}

/// A run of the convergence suite that is asked to end while a machine of its runs.
fn an_interrupted_run(scene: &Scene) -> Result<()> {
    let mut command = Command::new(harness::binary("convergence")?);
    command.args(["--moves", "1", "--out"]).arg(scene.path());
    let mut run = Process::start("convergence", scene.path(), command, None)?;
    let prefix = format!("godwit-{}-", run.pid());
    let made = || -> Result<Vec<PathBuf>> {
        let mut made = Vec::new();
        for directory in [Path::new("/run/netns"), &env::temp_dir()] {
            let entries = fs::read_dir(directory)?.filter_map(Result::ok);
            made.extend(entries.map(|entry| entry.path()).filter(|path| path_begins_with(path, &prefix)));
        }
        Ok(made)
    };
    wait::until_true("its machine runs", LIMIT, || Ok(made()?.iter().any(|path| path.join("source.out").exists())))?;
    ensure!(made()?.len() == 3, "two namespaces and a directory, not {:?}", made()?);
    run.signal(Signal::SIGTERM)?;
    let code = run.exit_code(LIMIT)?;
    ensure!(code == 1 && run.stderr().contains("interrupted"), "{code}: {}", run.describe());
    ensure!(made()?.is_empty(), "left behind: {:?}", made()?);
    Ok(())
}

fn path_begins_with(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
}
