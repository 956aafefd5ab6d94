//! Where a machine's claims lie, and what they say, for people.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use godwit_core::ownership::start::Refused;
use godwit_core::ownership::store::{Occupant, Record};
use godwit_vmm::MachineConfig;
use serde_json::{Value, json};

/// The claim directory that belongs to a disk: beside it.
pub fn beside(disk: &Path) -> PathBuf {
    let mut path = OsString::from(disk);
    path.push(".godwit");
    path.into()
}

/// Where a machine's claims lie unless somebody says otherwise: beside its first disk that is written. A block device has nothing
/// beside it that another host sees.
pub fn default_directory(config: &MachineConfig) -> Option<PathBuf> {
    let disk = config.disks.iter().find(|disk| !disk.readonly)?;
    let is_device = fs::metadata(&disk.path).is_ok_and(|found| found.file_type().is_block_device());
    // The disk's own place, however it is reached: two links to one disk have one claim directory.
    let real = disk.path.canonicalize().unwrap_or_else(|_| disk.path.clone());
    (!is_device).then(|| beside(&real))
}

/// Why a machine may not start, whose it is, and what to do.
pub fn refusal(why: &Refused, directory: &Path) -> String {
    let dir = directory.display();
    match why {
        Refused::NoClaims => format!(
            "{dir} has no claims: is the share mounted? If it is, and the machine has never been started, remove the directory: it is \
             made with the first claim"
        ),
        Refused::Others(record) if matches!(record.occupant, Occupant::Foreign(_)) => format!(
            "{}. Somebody has put it there by hand: find out who, and whether the machine runs anywhere, before anything in {dir} is touched",
            whose(record)
        ),
        Refused::Others(record) => format!(
            "the machine is not this host's to start: {}. It is free once it is powered off or stopped there. Only if its \
             owner is dead and stays dead: `run --take-ownership={}` (if it is not, two guests write to one disk)",
            whose(record),
            record.epoch
        ),
        Refused::AliveHere(record) => {
            format!("a process of this host has the machine: {}. `status`, `quit` or `migrate` it there", whose(record))
        }
        Refused::OtherMachine(record) => {
            format!("the claims in {dir} are another machine's: {}. Give --name or --ownership", whose(record))
        }
        Refused::Changed(record) => format!(
            "the owner is not the one that was looked at: {}. Look again (`godwit-sender ownership show {dir}`)",
            whose(record)
        ),
        Refused::CannotClaim(why) => format!("the machine cannot be claimed: {why}"),
        Refused::Contended => format!("others keep claiming the machine in {dir}: somebody else is starting it"),
        Refused::LastEpoch => format!("no epoch can follow the last one in {dir}"),
    }
}

/// Whose an epoch is, and since when.
pub fn whose(record: &Record) -> String {
    match &record.occupant {
        Occupant::Claim(_) if !record.complete => {
            format!("{}, {}, and is not known to have all of its memory", record.occupant, since(record.since))
        }
        Occupant::Claim(_) => format!("{}, {}", record.occupant, since(record.since)),
        Occupant::Foreign(_) => format!("{}: nobody can say whose epoch {} is", record.occupant, record.epoch),
    }
}

/// An epoch as the programs tell it.
pub fn as_json(record: &Record) -> Value {
    let claim = match &record.occupant {
        Occupant::Claim(claim) => json!({
            "machine": claim.claimant.machine.as_str(),
            "host": claim.claimant.host.as_str(),
            "boot_id": claim.claimant.boot_id.as_str(),
            "instance": claim.claimant.instance.as_str(),
        }),
        Occupant::Foreign(what) => json!({ "foreign": what }),
    };
    json!({
        "epoch": record.epoch.get(),
        "claim": claim,
        "age_s": record.since.map(|since| age(since).as_secs()),
        "running": record.running,
        "free": record.free,
        "complete": record.complete,
    })
}

/// By the storage's clock, which need not be this host's.
fn since(time: Option<SystemTime>) -> String {
    match time {
        Some(time) => format!("claimed {} ago", rough(age(time))),
        None => "claimed at an unknown time".into(),
    }
}

fn age(since: SystemTime) -> Duration {
    SystemTime::now().duration_since(since).unwrap_or_default()
}

/// A time for people, to one unit.
pub fn rough(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use godwit_core::ownership::{Claimant, Epoch, Nonce};
    use godwit_vmm::config::DiskConfig;

    use super::*;

    #[test]
    fn claims_lie_beside_the_first_disk_that_is_written() {
        let disk = |id: &str, readonly| DiskConfig { id: id.into(), path: format!("/srv/{id}.img").into(), readonly };
        let disks = vec![disk("cdrom", true), disk("root", false), disk("data", false)];
        let config = MachineConfig { disks, ..MachineConfig::default() };
        assert_eq!(default_directory(&config), Some("/srv/root.img.godwit".into()));
        assert_eq!(default_directory(&MachineConfig::default()), None);
    }

    #[test]
    fn a_refusal_says_whose_since_when_and_what_to_do() {
        let name = |text: &str| text.parse().unwrap();
        let me = Claimant { machine: name("fw1"), host: name("kvm1"), boot_id: name("b"), instance: name("i") };
        let epoch = Epoch::new(7).unwrap();
        let since = Some(SystemTime::now() - Duration::from_secs(3 * 3600 + 5));
        let record = Record {
            epoch,
            occupant: Occupant::Claim(me.claim(epoch, Nonce(1))),
            since,
            running: false,
            free: false,
            complete: true,
        };
        let text = refusal(&Refused::Others(Box::new(record)), Path::new("/srv/fw1.godwit"));
        for part in ["kvm1", "fw1", "epoch 7", "3 h ago", "--take-ownership=7"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let occupant = Occupant::Foreign("/srv/fw1.godwit/7 is no claim: not text".into());
        let foreign = Record { epoch, occupant, since: None, running: false, free: false, complete: true };
        let text = refusal(&Refused::Others(Box::new(foreign)), Path::new("/srv/fw1.godwit"));
        assert!(text.contains("no claim") && !text.contains("--take-ownership"), "{text}");
    }
}
