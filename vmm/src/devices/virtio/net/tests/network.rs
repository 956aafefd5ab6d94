//! A network namespace with a bridge, taps for machines and a tap that stands for the rest of the network.

use std::fs;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::devices::virtio::net::tap::Tap;

/// The tap that stands for the rest of the network.
pub(crate) const OUTSIDE: &str = "outside";
pub(crate) const OUTSIDE_MAC: MacAddress = MacAddress([0x02, 0, 0, 0, 0, 0x99]);

/// Puts the calling thread into a network namespace of its own, which goes with the thread and what it has open. False where that
/// is not possible: the test cannot be run.
#[must_use]
pub(crate) fn enter() -> bool {
    let possible = nix::unistd::geteuid().is_root() && fs::metadata("/dev/net/tun").is_ok();
    if !possible {
        assert!(std::env::var_os("CI").is_none(), "tests of taps need root and /dev/net/tun, and must be run");
        eprintln!("SKIPPED: needs root and /dev/net/tun");
        return false;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // Silent: what is seen on a tap comes from the tests.
    for interfaces in ["default", "all"] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6"), "1").unwrap();
    }
    true
}

/// Opens an interface on this tap. Waits while a program that another test is just starting has a copy of the tap's descriptor.
pub(crate) fn open_soon(tap: &str, needed: u64) -> Arc<Net> {
    let until = soon();
    loop {
        match open(&driver::config(tap), needed) {
            Err(error) if chain(&error).contains("in use") && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => {
                wait_until_connected(tap);
                return result.unwrap();
            }
        }
    }
}

/// Runs `ip` in the thread's namespace.
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// Runs a program of iproute2 in this thread's namespace.
pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A bridge with taps in it, and the one that stands for the rest of the network.
pub(crate) fn bridge(taps: &[&str]) -> Tap {
    bridge_called("br0", taps, OUTSIDE)
}

/// The same, where there are several.
pub(crate) fn bridge_called(name: &str, taps: &[&str], outside: &str) -> Tap {
    ip(&format!("link add {name} type bridge forward_delay 0 mcast_snooping 0"));
    ip(&format!("link set {name} up"));
    for tap in taps.iter().chain([&outside]) {
        add_tap(tap);
        ip(&format!("link set {tap} master {name}"));
    }
    let open = Tap::open(outside).unwrap();
    wait_until_connected(outside);
    open
}

/// Waits until a bridge forwards to and from a tap that has just been opened, if it is in one.
pub(crate) fn wait_until_connected(tap: &str) {
    let until = soon();
    while ip(&format!("-details link show {tap}")).contains("bridge_slave state disabled") {
        assert!(Instant::now() < until, "{tap} is not connected");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A tap that is up, in no bridge.
pub(crate) fn add_tap(name: &str) {
    ip(&format!("tuntap add {name} mode tap vnet_hdr"));
    ip(&format!("link set {name} up"));
}

impl Tap {
    /// The next frame with its header, if there is one soon.
    pub(crate) fn receive_with_header(&self, limit: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + limit;
        let mut buffer = vec![0; 128 << 10];
        loop {
            if let Ok(length) = self.read(&[], &mut buffer) {
                return Some(buffer[..length].into());
            }
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The next frame, if there is one soon.
    pub(crate) fn receive(&self, limit: Duration) -> Option<Vec<u8>> {
        Some(self.receive_with_header(limit)?.split_off(tap::HEADER_BYTES))
    }

    /// Sends a frame with a header of its own.
    pub(crate) fn send_with_header(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(self, frame), Ok(frame.len()));
    }
}
