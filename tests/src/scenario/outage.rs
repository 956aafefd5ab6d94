//! The lab's NFS server away for a while.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::lab::layout::Network;
use crate::lab::remote::Host;
use crate::scenario::stage::KERNEL;

/// How long clients may take to be served again: they ask again after 3 s, then 6 s, and a server gives locks out only once its
/// grace period of 10 s is over.
const RECOVERY_LIMIT: Duration = Duration::from_secs(90);

/// How the server goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// It is stopped: what is under way is answered first, connections are closed.
    Stopped,
    /// It falls silent, as when a host dies: requests may have been carried out though their answers are lost.
    Silent,
}

/// The server is away for as long as this exists.
pub(crate) struct Outage<'a> {
    storage: &'a Host,
    over: bool,
}

impl<'a> Outage<'a> {
    pub(crate) fn begin(lab: &'a Lab, manner: Manner) -> Result<Self> {
        let outage = Self { storage: lab.host("storage")?, over: false };
        let network = Network::Storage.name();
        let line = match manner {
            Manner::Stopped => "rpc.nfsd 0".to_owned(),
            Manner::Silent => format!("ip link set {network} down; rpc.nfsd 0"),
        };
        outage.storage.check(&line).context("the NFS server is stopped")?;
        Ok(outage)
    }

    /// Starts it again. Its clients have yet to notice.
    pub(crate) fn end(mut self) -> Result<()> {
        self.over = true;
        self.start()
    }

    fn start(&self) -> Result<()> {
        let line = format!("rpc.nfsd 8 && ip link set {} up", Network::Storage.name());
        self.storage.check(&line).map(drop).context("the NFS server is started again")
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        // After an error: hosts that hang would hide what it was.
        if !self.over {
            let _ = self.start();
        }
    }
}

/// Waits until `host` can lock files there again: the last thing that comes back.
pub(crate) fn wait_until_served(host: &Host) -> Result<()> {
    let output = host.run_within(&format!("flock --shared {KERNEL} true"), RECOVERY_LIMIT)?;
    ensure!(output.code == 0, "{} does not reach its storage again: {}", host.name(), output.stderr);
    Ok(())
}
