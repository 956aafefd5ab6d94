//! Cloud Hypervisor running the workload guest's image, for comparisons: where a person has the program.
//!
//! Its control interface is HTTP over a unix socket (its `vmm/src/api/openapi/cloud-hypervisor.yaml`), which curl speaks.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde_json::{Value, json};

use crate::process::Process;
use crate::qemu::Place;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A socket that listens, in the fourth column of /proc/net/tcp (the kernel's `TCP_LISTEN`).
const LISTENING: &str = "0A";

/// A Cloud Hypervisor process.
pub struct CloudHypervisor {
    /// The process.
    pub process: Process,
    directory: PathBuf,
    api: PathBuf,
}

/// What it is asked and does not answer at once.
pub struct Request(Process);

impl CloudHypervisor {
    /// Starts `binary`: with an image it boots that, without it waits for a machine ([`CloudHypervisor::listen`]).
    pub fn start(binary: &Path, name: &str, place: Place<'_>, machine: Option<(&Path, &str)>) -> Result<Self> {
        let api = place.directory.join(format!("{name}.api"));
        let mut command = Command::new(binary);
        command.arg("--api-socket").arg(&api);
        if let Some((image, memory)) = machine {
            command.arg("--kernel").arg(image).args(["--memory", &format!("size={memory}"), "--cpus", "boot=1"]);
            command.args(["--serial", "off", "--console", "off"]);
        }
        let mut process = Process::start(name, place.directory, command, place.namespace)?;
        let connect = |_: &Process| Ok(UnixStream::connect(&api).ok());
        process.wait_while_running("Cloud Hypervisor's control socket", START_LIMIT, connect)?;
        Ok(Self { process, directory: place.directory.to_owned(), api })
    }

    /// Waits for a machine on a TCP port of its network. The request lasts until one has arrived.
    pub fn listen(&mut self, port: u16) -> Result<Request> {
        let request = self.ask("vm.receive-migration", &json!({ "receiver_url": format!("tcp:0.0.0.0:{port}") }))?;
        let sockets = format!("/proc/{}/net/tcp", self.process.pid());
        self.process.wait_while_running("Cloud Hypervisor listens", START_LIMIT, |_| {
            let sockets = std::fs::read_to_string(&sockets).context("cannot look for the port")?;
            Ok(sockets.lines().any(|line| is_listening(line, port)).then_some(()))
        })?;
        Ok(request)
    }

    /// Sends its machine to `host:port`.
    pub fn send(&self, to: &str, connections: u32, downtime_limit_ms: u64) -> Result<Request> {
        let destination = format!("tcp:{to}");
        let mut request = json!({ "destination_url": destination, "downtime_ms": downtime_limit_ms });
        if connections > 1 {
            request["connections"] = json!(connections);
        }
        self.ask("vm.send-migration", &request)
    }

    /// Whether it has ended, as it does when its machine has moved. It stays to be looked at until it is dropped.
    pub fn has_ended(&self) -> Result<bool> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(waitid(Id::Pid(self.process.pid()), flags)? != WaitStatus::StillAlive)
    }

    fn ask(&self, what: &str, request: &Value) -> Result<Request> {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail-with-body", "--request", "PUT", "--unix-socket"]);
        command.arg(&self.api).args(["--header", "Content-Type: application/json", "--data", &request.to_string()]);
        command.arg(format!("http://localhost/api/v1/{what}"));
        Ok(Request(Process::start(what, &self.directory, command, None)?))
    }
}

impl Request {
    /// Fails if it was refused.
    pub fn check(&mut self) -> Result<()> {
        if self.0.is_running()? {
            return Ok(());
        }
        let code = self.0.exit_code(START_LIMIT)?;
        ensure!(code == 0, "Cloud Hypervisor refused: {}{}", self.0.stdout(), self.0.stderr());
        Ok(())
    }
}

/// Whether a line of /proc/net/tcp is a socket that listens on this port.
fn is_listening(line: &str, port: u16) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next(), fields.nth(1));
    local.is_some_and(|local| local.ends_with(&format!(":{port:04X}"))) && state == Some(LISTENING)
}

/// A person's binary.
pub fn check_binary(binary: &Path) -> Result<()> {
    let output = Command::new(binary).arg("--version").output();
    let output = output.with_context(|| format!("cannot run {}", binary.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.lines().next().unwrap_or_default();
    if !version.starts_with("cloud-hypervisor") {
        bail!("{} says of itself {:?}, which is not Cloud Hypervisor", binary.display(), version);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_on_a_port() {
        let line = "   0: 00000000:115C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert!(is_listening(line, 4444));
        assert!(!is_listening(line, 4445));
        assert!(!is_listening(&line.replace(" 0A ", " 01 "), 4444), "a connection");
        assert!(!is_listening("  sl  local_address rem_address   st tx_queue rx_queue", 4444));
    }

    #[test]
    fn another_program_is_not_taken_for_it() {
        assert!(check_binary(Path::new("/bin/true")).is_err());
        assert!(check_binary(Path::new("/nowhere/at/all")).is_err());
    }
}
