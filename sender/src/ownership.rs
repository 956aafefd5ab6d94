//! Claims at the sender: winning the right to start a machine, and looking at claims.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use godwit_control::claims::{default_directory, refusal, whose};
use godwit_control::console::{out, say};
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::host::INSTANCES;
use godwit_core::ownership::start::Mode;
use godwit_core::ownership::store::{Occupant, Reading, Record};
use godwit_core::ownership::timed::Timed;
use godwit_core::ownership::{Epoch, Holding, Host, Nonce, begin};
use godwit_vmm::MachineConfig;
use serde_json::json;

use crate::Failure;
use crate::cli::{ClaimArgs, OwnershipAction, OwnershipArgs};

/// How long the store may take to be told that a machine that did not boot is free.
const FREE_LIMIT: Duration = Duration::from_secs(5);

/// How long the store may take to show whose the machine is, before it is taken over.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Claims the machine, if it has claims. Blocks as long as the store does not answer, saying so.
pub(crate) fn claim(args: &ClaimArgs, config: &MachineConfig) -> Result<Option<Arc<Holding>>, Failure> {
    let Some(directory) = directory(args, config)? else {
        return match args.take_ownership {
            Some(_) => Err(Failure::Usage("--take-ownership: the machine has no claims (--ownership DIR)".into())),
            None => Ok(None),
        };
    };
    let host = Arc::new(
        Host::register(args.host_id.clone(), Path::new(INSTANCES))
            .context("cannot make this process known to others of this host (--ownership none does without)")?,
    );
    let store = DirectoryStore::new(&directory);
    let store = Timed::start(store).context("cannot start a thread")?;
    let mode = mode(args, &directory, &store)?;
    let name = config.name.parse().map_err(|error| Failure::Usage(format!("--name: {error}")))?;
    let (me, nonce) = (host.claimant(name), Nonce::random());
    let tell = |why: &str| say(format_args!("the machine cannot start yet: {why}"));
    let right = begin(me.clone(), nonce, mode, &store, Path::new(INSTANCES), tell)
        .map_err(|why| Failure::Refused(refusal(&why, &directory)))?;
    let claim = me.claim(right.epoch(), nonce);
    Ok(Some(Arc::new(Holding::new(directory, store, host, claim, right))))
}

/// The machine did not boot: it is anybody's.
pub(crate) fn free(holding: &Holding) {
    if let Err(why) = holding.free(FREE_LIMIT) {
        say(format_args!("other hosts cannot see that the machine is free: {why}"));
    }
}

fn directory(args: &ClaimArgs, config: &MachineConfig) -> Result<Option<PathBuf>, Failure> {
    match &args.ownership {
        None => Ok(default_directory(config)),
        Some(path) if path.as_os_str() == "none" => Ok(None),
        Some(path) => {
            let path = std::path::absolute(path).with_context(|| format!("--ownership {}", path.display()))?;
            Ok(Some(path))
        }
    }
}

/// A machine without a claim directory is new; any other has been started before.
fn mode(args: &ClaimArgs, directory: &Path, store: &Timed) -> Result<Mode, Failure> {
    let Some(shown) = args.take_ownership else {
        return match fs::create_dir(directory) {
            Ok(()) => Ok(Mode::New),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Mode::Existing),
            Err(error) => Err(Failure::Internal(anyhow!(
                "cannot make the claim directory {}: {error} (--ownership DIR puts it elsewhere)",
                directory.display()
            ))),
        };
    };
    let newest = match store.newest(LOOK_LIMIT) {
        Reading::Newest(Some(newest)) => newest,
        Reading::Newest(None) => {
            return Err(Failure::Refused(format!("there is no claim in {} to take over", directory.display())));
        }
        Reading::Unknown(why) => return Err(Failure::Internal(anyhow!(why))),
    };
    say(format_args!("taking over from its owner: {}", whose(&newest)));
    say("if that owner is not dead, two guests now write to the same disks");
    let shown = shown.map_or(Some(newest.epoch), |epoch| Epoch::new(epoch.get()));
    Ok(Mode::TakeOver(shown.unwrap_or(newest.epoch)))
}

/// Prints what a claim directory says.
pub(crate) fn show(args: &OwnershipArgs, json: bool) -> Result<ExitCode, Failure> {
    let OwnershipAction::Show { directory } = &args.action;
    let store = DirectoryStore::new(directory);
    let timed = Timed::start(store.clone()).context("cannot start a thread")?;
    let newest = match timed.newest(LOOK_LIMIT) {
        Reading::Newest(newest) => newest,
        Reading::Unknown(why) => return Err(Failure::Internal(anyhow!(why))),
    };
    let mut records = Vec::new();
    for n in 1..newest.as_ref().map_or(0, |newest| newest.epoch.get()) {
        let Some(epoch) = Epoch::new(n) else { continue };
        let record = store.record(epoch).with_context(|| format!("cannot read {}", directory.display()))?;
        records.extend(record);
    }
    records.extend(newest);
    if json {
        out(json!({ "directory": directory, "claims": records.iter().map(as_json).collect::<Vec<_>>() }));
        return Ok(ExitCode::SUCCESS);
    }
    for record in &records {
        let running = if record.running { ", has run" } else { "" };
        let free = if record.free { ", free" } else { "" };
        out(format_args!("{}{running}{free}", whose(record)));
    }
    match records.last() {
        None => out("no claims"),
        Some(record) if record.free => out("the machine is free: any host may start it"),
        Some(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(record: &Record) -> serde_json::Value {
    let claim = match &record.occupant {
        Occupant::Claim(claim) => json!({
            "machine": claim.claimant.machine.as_str(),
            "host": claim.claimant.host.as_str(),
            "boot_id": claim.claimant.boot_id.as_str(),
            "instance": claim.claimant.instance.as_str(),
        }),
        Occupant::Foreign(what) => json!({ "foreign": what }),
    };
    json!({ "epoch": record.epoch.get(), "claim": claim, "running": record.running, "free": record.free })
}
