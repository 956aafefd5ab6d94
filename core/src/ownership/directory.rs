//! Claims as symbolic links in a directory that both hosts see.
//!
//! The entry named `n` is a link whose *target text* is the claim; it points nowhere. symlink(2) is one round trip on NFS,
//! exclusive by nature, and leaves no lock and no open file behind: locks on NFS outlive stopped holders, or never expire.
//!
//! What an error of symlink(2) means: those that a server gives *instead of* creating are [`ClaimAnswer::Failed`], if the
//! entry is not there afterwards; all others are [`ClaimAnswer::Unknown`].

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::claim::{Claim, EntryName, Epoch, MAX_CLAIM_BYTES, Marker};
use super::store::{ClaimAnswer, ClaimStore, MarkAnswer, Occupant, Reading, Record};

/// More entries than any machine's life leaves: whoever put them there, they are not read through.
pub const MAX_ENTRIES: usize = 1 << 20;
/// So many claims that a stale listing left out are looked up one by one.
const MAX_UNLISTED: usize = 64;

/// A claim directory.
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    directory: PathBuf,
}

impl DirectoryStore {
    /// The claims in this directory, which exists.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// What is found at an epoch; `None` if nothing is to be seen there.
    pub fn record(&self, epoch: Epoch) -> io::Result<Option<Record>> {
        let Some(occupant) = self.occupant(epoch)? else { return Ok(None) };
        let running = self.is_marked(epoch, Marker::Running)?;
        let free = self.is_marked(epoch, Marker::Free)?;
        let since = fs::symlink_metadata(self.entry(EntryName::Claim(epoch))).and_then(|data| data.modified()).ok();
        let complete = match &occupant {
            Occupant::Claim(Claim { incomplete: true, .. }) => self.is_marked(epoch, Marker::Complete)?,
            _ => true,
        };
        Ok(Some(Record { epoch, occupant, since, running, free, complete }))
    }

    fn entry(&self, name: EntryName) -> PathBuf {
        self.directory.join(name.to_string())
    }

    fn occupant(&self, epoch: Epoch) -> io::Result<Option<Occupant>> {
        let path = self.entry(EntryName::Claim(epoch));
        match fs::read_link(&path) {
            Ok(target) => Ok(Some(occupant(&path, epoch, target.as_os_str().as_bytes()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                Ok(Some(Occupant::Foreign(format!("{} is not a symbolic link", path.display()))))
            }
            Err(error) => Err(error),
        }
    }

    fn is_marked(&self, epoch: Epoch, marker: Marker) -> io::Result<bool> {
        match fs::symlink_metadata(self.entry(EntryName::Marker(epoch, marker))) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every claim that can be seen, the newest last.
    pub fn records(&self) -> io::Result<Vec<Record>> {
        let records = self.epochs()?.into_iter().map(|epoch| self.record(epoch));
        records.filter_map(Result::transpose).collect()
    }

    fn newest_record(&self) -> io::Result<Option<Record>> {
        self.epochs()?.last().map_or(Ok(None), |newest| self.record(*newest))
    }

    fn epochs(&self) -> io::Result<BTreeSet<Epoch>> {
        let mut epochs = BTreeSet::new();
        for (number, entry) in fs::read_dir(&self.directory)?.enumerate() {
            if number == MAX_ENTRIES {
                return Err(io::Error::other(format!("more than {MAX_ENTRIES} entries")));
            }
            let name = entry?.file_name();
            if let Some(EntryName::Claim(epoch)) = name.to_str().and_then(EntryName::parse) {
                epochs.insert(epoch);
            }
        }
        // A listing may be stale where a lookup is not.
        for _ in 0..MAX_UNLISTED {
            let next = epochs.last().map_or(Some(Epoch::FIRST), |newest| newest.next());
            match next {
                Some(next) if self.occupant(next)?.is_some() => epochs.insert(next),
                _ => break,
            };
        }
        Ok(epochs)
    }

    /// The claim's entry is there, it is said: whose is it?
    fn taken(&self, claim: &Claim) -> ClaimAnswer {
        match self.occupant(claim.epoch) {
            Ok(Some(occupant)) => ClaimAnswer::Exists(occupant),
            Ok(None) => ClaimAnswer::Unknown(self.failure("the entry is there and cannot be seen", claim.epoch)),
            Err(error) => ClaimAnswer::Unknown(self.failure(&format!("cannot read the entry: {error}"), claim.epoch)),
        }
    }

    /// The server refused to create the entry. If it is there all the same, an earlier transmission of the request won.
    fn refused(&self, claim: &Claim, error: &io::Error) -> ClaimAnswer {
        match self.occupant(claim.epoch) {
            Ok(Some(occupant)) => ClaimAnswer::Exists(occupant),
            Ok(None) => ClaimAnswer::Failed(self.failure(&error.to_string(), claim.epoch)),
            Err(_) if cannot_reach(error) => ClaimAnswer::Failed(self.failure(&error.to_string(), claim.epoch)),
            Err(_) => ClaimAnswer::Unknown(self.failure(&error.to_string(), claim.epoch)),
        }
    }

    fn failure(&self, why: &str, epoch: Epoch) -> String {
        format!("claim {epoch} in {}: {why}", self.directory.display())
    }
}

impl ClaimStore for DirectoryStore {
    fn claim(&self, claim: &Claim) -> ClaimAnswer {
        match symlink(claim.to_string(), self.entry(EntryName::Claim(claim.epoch))) {
            Ok(()) => ClaimAnswer::Created,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.taken(claim),
            Err(error) if does_nothing(&error) => self.refused(claim, &error),
            Err(error) => ClaimAnswer::Unknown(self.failure(&error.to_string(), claim.epoch)),
        }
    }

    fn newest(&self) -> Reading {
        match self.newest_record() {
            Ok(record) => Reading::Newest(record),
            Err(error) => Reading::Unknown(format!("cannot read the claims in {}: {error}", self.directory.display())),
        }
    }

    fn mark(&self, epoch: Epoch, marker: Marker) -> MarkAnswer {
        let name = EntryName::Marker(epoch, marker);
        match symlink(name.to_string(), self.entry(name)) {
            Ok(()) => MarkAnswer::Marked,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => MarkAnswer::Marked,
            Err(error) => {
                MarkAnswer::Unknown(format!("cannot write marker {name} in {}: {error}", self.directory.display()))
            }
        }
    }
}

fn occupant(path: &Path, epoch: Epoch, target: &[u8]) -> Occupant {
    let foreign = |why: &dyn std::fmt::Display| Occupant::Foreign(format!("{} is no claim: {why}", path.display()));
    let Ok(text) = std::str::from_utf8(&target[..target.len().min(MAX_CLAIM_BYTES + 1)]) else {
        return foreign(&"not text");
    };
    match text.parse::<Claim>() {
        Ok(claim) if claim.epoch == epoch => Occupant::Claim(claim),
        Ok(claim) => foreign(&format_args!("it says epoch {}", claim.epoch)),
        Err(error) => foreign(&error),
    }
}

/// Errors that are given instead of creating an entry.
fn does_nothing(error: &io::Error) -> bool {
    use ErrorKind::*;
    cannot_reach(error) || matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
}

/// Errors of finding the directory and being let in.
fn cannot_reach(error: &io::Error) -> bool {
    use ErrorKind::*;
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

#[cfg(test)]
mod tests;
