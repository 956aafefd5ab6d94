//! A destination's part in claims: whether it sees the source's, and asking them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::machine::Refusal;
use crate::message::SharedClaims;
use crate::ownership::destination::{Action, DestinationHandover, Input};
use crate::ownership::directory::DirectoryStore;
use crate::ownership::store::{ClaimStore, Occupant};
use crate::ownership::timed::Timed;
use crate::ownership::{CALL_LIMIT, Claim, Epoch, Holding, Host, Marker, Nonce, RETRY_GAP, RightToRun, Rules};

/// How long the storage may take to show the source's claim, in preflight.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// Which claim directories a destination opens, and as whom it claims.
#[derive(Debug, Clone)]
pub struct ClaimOptions {
    /// This process.
    pub host: Arc<Host>,
    /// A claim directory that a source names may be opened if it lies in one of these.
    pub allowed: Vec<PathBuf>,
    /// Looked into as well, whatever path the source names: its claims may lie elsewhere here.
    pub own: Vec<PathBuf>,
}

/// Claims that both ends have been seen to share.
pub(super) struct Shared {
    directory: PathBuf,
    store: Timed,
    host: Arc<Host>,
    source: Claim,
}

impl Shared {
    /// Looks for the source's claim here. Its nonce is random: whoever sees it sees the same store.
    pub(super) fn find(options: &ClaimOptions, offered: &SharedClaims, machine: &str) -> Result<Self, Refusal> {
        let refused = |why: String| Refusal::new("ownership", why);
        let source: Claim =
            offered.claim.parse().map_err(|error| refused(format!("the source's claim cannot be read: {error}")))?;
        if source.claimant.machine.as_str() != machine {
            return Err(refused(format!("the claims are those of {}, not of {machine}", source.claimant.machine)));
        }
        let (tell, told) = mpsc::channel();
        let (looked_for, candidates) = (source.clone(), (options.clone(), PathBuf::from(&offered.directory)));
        thread::Builder::new()
            .name("claims-look".into())
            .spawn(move || {
                let (options, named) = candidates;
                // Whoever has waited in vain is gone.
                let _ = tell.send(look(&options, &named, &looked_for));
            })
            .map_err(|error| refused(format!("no thread could be started: {error}")))?;
        let directory = match told.recv_timeout(LOOK_LIMIT) {
            Ok(found) => found.map_err(refused)?,
            Err(_) => return Err(refused(format!("the claim store did not answer within {LOOK_LIMIT:?}"))),
        };
        let store = Timed::start(DirectoryStore::new(&directory))
            .map_err(|error| refused(format!("no thread could be started: {error}")))?;
        Ok(Self { directory, store, host: Arc::clone(&options.host), source })
    }

    /// The rules of this handover.
    pub(super) fn handover(&self) -> Result<DestinationHandover, Refusal> {
        let next =
            self.source.epoch.next().ok_or_else(|| Refusal::new("ownership", "no epoch can follow the source's"))?;
        let me = self.host.claimant(self.source.claimant.machine.clone());
        Ok(DestinationHandover::new(me, next, Rules::default()))
    }

    pub(super) fn store(&self) -> &Timed {
        &self.store
    }

    /// What was won.
    pub(super) fn into_holding(self, right: RightToRun, nonce: Nonce, incomplete: bool) -> Holding {
        let me = self.host.claimant(self.source.claimant.machine.clone());
        let claim = Claim { incomplete, ..me.claim(right.epoch(), nonce) };
        Holding::new(self.directory, self.store, self.host, claim, right)
    }

    /// Says in the store that the guest has run here, on a thread of its own: nothing waits for it, and it tries until it is said.
    pub(super) fn mark_running(&self, epoch: Epoch, mut handover: DestinationHandover) {
        let store = self.store.clone();
        let marked = thread::Builder::new().name("claims-mark".into()).spawn(move || {
            let mut input = Input::Marked(store.mark(epoch, Marker::Running, CALL_LIMIT));
            while !handover.is_over() {
                for action in handover.handle(std::mem::replace(&mut input, Input::Retry)) {
                    match action {
                        Action::Mark(epoch, marker) => input = Input::Marked(store.mark(epoch, marker, CALL_LIMIT)),
                        Action::Wait => thread::sleep(RETRY_GAP),
                        Action::Report(why) => {
                            tracing::warn!("the source cannot see yet that the guest runs here: {why}")
                        }
                        _ => {}
                    }
                }
            }
        });
        if let Err(error) = marked {
            tracing::error!("no thread could be started to say in the claims that the guest runs here: {error}");
        }
    }
}

/// The directory in which the source's claim is the newest.
fn look(options: &ClaimOptions, named: &Path, source: &Claim) -> Result<PathBuf, String> {
    let mut reasons = Vec::new();
    let allowed = |real: &Path| {
        options.allowed.iter().any(|folder| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder)))
    };
    let mut candidates = options.own.clone();
    match named.canonicalize() {
        Ok(real) if allowed(&real) => candidates.insert(0, named.to_owned()),
        Ok(_) => reasons.push(format!(
            "{} lies in no folder from which this host opens claims (--disk-dir, or --ownership DIR)",
            named.display()
        )),
        Err(error) => {
            reasons.push(format!("{} cannot be found: {error} (is the share mounted here?)", named.display()));
        }
    }
    let taken = |store: &DirectoryStore| Some(store.record(source.epoch.next()?).ok()??.occupant);
    for directory in candidates {
        let store = DirectoryStore::new(&directory);
        // A listing makes a network file system look again for what it remembers as missing.
        let _ = store.newest();
        match store.record(source.epoch) {
            Ok(Some(record)) if record.occupant == Occupant::Claim(source.clone()) => match taken(&store) {
                Some(occupant) => reasons.push(format!("the machine was claimed after the source: {occupant}")),
                None => return Ok(directory),
            },
            Ok(Some(record)) => reasons.push(format!(
                "{} has other claims than the source's ({}): it is another directory",
                directory.display(),
                record.occupant
            )),
            Ok(None) => reasons.push(format!(
                "the source's claim {} is not to be seen in {}: it is another directory",
                source.epoch,
                directory.display()
            )),
            Err(error) => reasons.push(format!("the claims in {} cannot be read: {error}", directory.display())),
        }
    }
    Err(reasons.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_store_in_an_allowed_place_will_do() {
        let scene = tempfile::tempdir().unwrap();
        let path = |name: &str| scene.path().join(name);
        for name in ["share/m.godwit", "copy/m.godwit", "instances"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        let host = Arc::new(Host::register(Some("there".parse().unwrap()), &path("instances")).unwrap());
        let claim = host.claimant("m".parse().unwrap()).claim(Epoch::FIRST, Nonce(7));
        DirectoryStore::new(path("share/m.godwit")).claim(&claim);
        DirectoryStore::new(path("copy/m.godwit"))
            .claim(&host.claimant("m".parse().unwrap()).claim(Epoch::FIRST, Nonce(8)));
        let offered =
            |name: &str| SharedClaims { directory: path(name).display().to_string(), claim: claim.to_string() };
        let find = |allowed: &[&str], own: &[&str], named: &str, machine: &str| {
            let paths = |names: &[&str]| names.iter().map(|name| path(name)).collect();
            let options = ClaimOptions { host: Arc::clone(&host), allowed: paths(allowed), own: paths(own) };
            Shared::find(&options, &offered(named), machine).map(|_| ()).map_err(|refusal| refusal.reason)
        };
        assert_eq!(find(&["share"], &[], "share/m.godwit", "m"), Ok(()));
        assert_eq!(find(&[], &["share/m.godwit"], "elsewhere", "m"), Ok(()), "mounted elsewhere");
        assert!(find(&[], &[], "share/m.godwit", "m").unwrap_err().contains("--ownership"));
        assert!(find(&["share"], &[], "copy/../share/m.godwit", "other").unwrap_err().contains("not of other"));
        assert!(find(&["copy"], &[], "copy/m.godwit", "m").unwrap_err().contains("another directory"));
        assert!(find(&["share"], &[], "share/../copy/m.godwit", "m").unwrap_err().contains("no folder"));
        let after = host.claimant("m".parse().unwrap()).claim(Epoch::new(2).unwrap(), Nonce(9));
        DirectoryStore::new(path("share/m.godwit")).claim(&after);
        assert!(find(&["share"], &[], "share/m.godwit", "m").unwrap_err().contains("after the source"));
        assert!(find(&["share"], &[], "share/gone", "m").unwrap_err().contains("mounted"));
    }
}
