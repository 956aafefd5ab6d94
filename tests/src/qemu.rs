//! QEMU running the workload guest's image: for the test that it boots elsewhere, and for comparisons.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_control::qmp::Client;
use serde_json::{Value, json};

use crate::netns::Namespace;
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

/// Where a QEMU process runs.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// For its control socket and logs.
    pub directory: &'a Path,
    /// Its network.
    pub namespace: Option<&'a Namespace>,
}

impl Qemu {
    /// Starts it with the PVH ELF `image`; with `incoming` it waits until [`Qemu::listen`] instead of booting.
    pub fn start(name: &str, place: Place<'_>, image: &Path, memory: &str, incoming: bool) -> Result<Self> {
        let control = place.directory.join(format!("{name}.qmp"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-cpu", CPU, "-machine", "microvm", "-display", "none", "-m", memory]);
        command.args(["-nodefaults", "-no-user-config", "-kernel"]).arg(image);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", control.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut process = Process::start(name, place.directory, command, place.namespace)?;
        process.wait_while_running("QEMU's control socket", START_LIMIT, |_| Ok(Client::connect(&control).ok()))?;
        Ok(Self { process, control })
    }

    /// Waits for a machine at `uri`, with the settings made before.
    pub fn listen(&self, uri: &str) -> Result<()> {
        self.qmp()?.execute("migrate-incoming", json!({ "uri": uri })).context("migrate-incoming").map(drop)
    }

    /// A connection to its control socket (it serves one at a time).
    pub fn qmp(&self) -> Result<Client> {
        wait::until("QEMU's control socket", START_LIMIT, || Ok(Client::connect(&self.control).ok()))
    }

    /// What `query-migrate` answers.
    pub fn migration(&self) -> Result<Value> {
        Ok(self.qmp()?.execute("query-migrate", json!({}))?)
    }
}
