//! Claims at the sender: winning the right to start a machine, and looking at claims.

use std::fs;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use godwit_control::claims::{as_json, default_directory, refusal, whose};
use godwit_control::console::{out, say};
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::host::INSTANCES;
use godwit_core::ownership::start::Mode;
use godwit_core::ownership::store::{Reading, Record};
use godwit_core::ownership::timed::{Timed, within};
use godwit_core::ownership::{Epoch, Holding, Host, Nonce, begin};
use godwit_vmm::MachineConfig;
use serde_json::json;

use crate::Failure;
use crate::cli::{ClaimArgs, OwnershipAction, OwnershipArgs};
use crate::confirm::ConfirmArgs;

/// How long the store may take to be told that a machine that did not boot is free.
const FREE_LIMIT: Duration = Duration::from_secs(5);

/// How long the storage may take to show what claims there are, and to make the directory for the first.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// How often whoever waits for the store is told the same again.
const TELL_GAP: Duration = Duration::from_secs(5);

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
    let mode = mode(args, config, &directory, &store)?;
    let name = config.name.parse().map_err(|error| Failure::Usage(format!("--name: {error}")))?;
    let (me, nonce) = (host.claimant(name), Nonce::random());
    let mut told: Option<(Instant, String)> = None;
    let tell = |why: &str| {
        if told.as_ref().is_none_or(|(when, last)| last != why || when.elapsed() >= TELL_GAP) {
            say(format_args!("the machine cannot start yet, it is tried again: {why}"));
            told = Some((Instant::now(), why.to_owned()));
        }
    };
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
        None => {
            let config = config.clone();
            let found = within(LOOK_LIMIT, move || default_directory(&config));
            Ok(found.map_err(|why| anyhow!("cannot look for the machine's claims beside its disk: {why}"))?)
        }
        Some(path) if path.as_os_str() == "none" => Ok(None),
        Some(path) => {
            let path = std::path::absolute(path).with_context(|| format!("--ownership {}", path.display()))?;
            Ok(Some(path))
        }
    }
}

/// A machine without a claim directory is new; any other has been started before.
fn mode(args: &ClaimArgs, config: &MachineConfig, directory: &Path, store: &Timed) -> Result<Mode, Failure> {
    if let Some(shown) = args.take_ownership {
        return take_over(args, shown, config, directory, store).map(Mode::TakeOver);
    }
    let path = directory.to_owned();
    let made = within(LOOK_LIMIT, move || match fs::create_dir(&path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(Mode::Existing),
        made => made.map(|()| Mode::New),
    });
    let why = match made {
        Ok(Ok(mode)) => return Ok(mode),
        Ok(Err(error)) if error.kind() == ErrorKind::AlreadyExists => "there is something else of that name".into(),
        Ok(Err(error)) => error.to_string(),
        Err(why) => why,
    };
    let directory = directory.display();
    Err(Failure::Internal(anyhow!(
        "cannot make the claim directory {directory}: {why} (--ownership DIR puts it elsewhere)"
    )))
}

/// A person takes the machine over: the epoch whose owner is said to be dead. Naming it is saying that one has looked; otherwise the person
/// is shown who that is, and asked.
fn take_over(
    args: &ClaimArgs,
    named: Option<NonZeroU64>,
    config: &MachineConfig,
    directory: &Path,
    store: &Timed,
) -> Result<Epoch, Failure> {
    let newest = match store.newest(LOOK_LIMIT) {
        Reading::Newest(Some(newest)) => newest,
        Reading::Newest(None) => {
            return Err(Failure::Refused(format!("there is no claim in {} to take over", directory.display())));
        }
        Reading::Unknown(why) => return Err(Failure::Internal(anyhow!(why))),
    };
    let named = named.and_then(|epoch| Epoch::new(epoch.get()));
    let confirm = ConfirmArgs { yes: args.confirm.yes || named.is_some() };
    confirm.ask(&risk_of_taking_over(&newest), &config.name)?;
    Ok(named.unwrap_or(newest.epoch))
}

fn risk_of_taking_over(newest: &Record) -> Vec<String> {
    let next = newest.epoch.next().map_or_else(String::new, |next| format!(" claims epoch {next} and"));
    vec![
        format!("taking over from its owner: {}{}", whose(newest), if newest.has_run() { ", has run" } else { "" }),
        format!("This{next} boots the machine anew, from its disks: what was only in its memory is lost."),
        "RISK: if that owner is not dead, two guests write to the same disks from then on.".into(),
    ]
}

/// Prints what a claim directory says.
pub(crate) fn show(args: &OwnershipArgs, json: bool) -> Result<ExitCode, Failure> {
    let OwnershipAction::Show { directory } = &args.action;
    let store = DirectoryStore::new(directory);
    let failed = |why: String| anyhow!("cannot read the claims in {}: {why}", directory.display());
    let records = within(LOOK_LIMIT, move || store.records()).map_err(failed)?;
    let records = records.map_err(|error| failed(error.to_string()))?;
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
        None => out(format_args!(
            "no claims in {}: if a machine's claims should be here, its share may not be mounted",
            directory.display()
        )),
        Some(record) if record.free => out("the machine is free: any host may start it"),
        Some(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}
