//! QEMU running the workload guest's image: for the test that it boots elsewhere, and for comparisons.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_control::qmp::Client;
use serde_json::{Value, json};

use crate::process::Process;
use crate::wait;

/// All that the host has, less one MSR: where KVM shows it but does not let it be set, QEMU aborts with plain `max`.
const CPU: &str = "max,-arch-capabilities";

const START_LIMIT: Duration = Duration::from_secs(20);

/// A QEMU process.
pub struct Qemu {
    /// The process.
    pub process: Process,
    control: PathBuf,
}

impl Qemu {
    /// Starts it with the PVH ELF `image`; with `incoming` it waits for a machine there instead of booting.
    pub fn start(name: &str, directory: &Path, image: &Path, memory: &str, incoming: Option<&str>) -> Result<Self> {
        let control = directory.join(format!("{name}.qmp"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-cpu", CPU, "-machine", "microvm", "-display", "none", "-m", memory]);
        command.args(["-nodefaults", "-no-user-config", "-kernel"]).arg(image);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", control.display()));
        if let Some(uri) = incoming {
            command.args(["-incoming", uri]);
        }
        let mut process = Process::start(name, directory, command, None)?;
        process.wait_while_running("QEMU's control socket", START_LIMIT, |_| Ok(Client::connect(&control).ok()))?;
        Ok(Self { process, control })
    }

    /// A connection to its control socket (it serves one at a time).
    pub fn qmp(&self) -> Result<Client> {
        wait::until("QEMU's control socket", START_LIMIT, || Ok(Client::connect(&self.control).ok()))
    }

    /// Lets QEMU send as fast as it can and pause for at most `downtime_limit_ms`.
    pub fn set_unlimited(&self, downtime_limit_ms: u64) -> Result<()> {
        let parameters = json!({ "max-bandwidth": 1_000_000_000_000u64, "downtime-limit": downtime_limit_ms });
        self.qmp()?.execute("migrate-set-parameters", parameters).context("migrate-set-parameters").map(drop)
    }

    /// What `query-migrate` answers.
    pub fn migration(&self) -> Result<Value> {
        Ok(self.qmp()?.execute("query-migrate", json!({}))?)
    }
}
