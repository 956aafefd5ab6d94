//! Races other processes, here and on other hosts, for a machine that does not exist: it is started by the rules that real ones
//! are started by, and freed at once, again and again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use godwit_core::ownership::claim::{Claim, Marker};
use godwit_core::ownership::directory::DirectoryStore;
use godwit_core::ownership::host::INSTANCES;
use godwit_core::ownership::start::{Mode, Refused};
use godwit_core::ownership::store::{ClaimAnswer, ClaimStore, MarkAnswer, Occupant, Reading};
use godwit_core::ownership::timed::Timed;
use godwit_core::ownership::{Epoch, Holding, Host, Nonce, begin};
use godwit_tests::scenario::race::Event;

/// How long the store may be away.
const STORE_LIMIT: Duration = Duration::from_secs(120);

/// Claims in `directory` for as long as `length`, and prints what happens.
pub(crate) fn run(directory: &Path, length: Duration) -> Result<()> {
    let instances = Path::new(INSTANCES);
    let host = Arc::new(Host::register(None, instances).context("cannot register this process")?);
    let me = host.claimant("race".parse()?);
    let store = Timed::start(Telling(DirectoryStore::new(directory))).context("cannot start a thread")?;
    let until = Instant::now() + length;
    while Instant::now() < until {
        let nonce = Nonce::random();
        match begin(me.clone(), nonce, Mode::New, &store, instances, |why| eprintln!("waiting: {why}")) {
            Ok(right) => {
                let claim = me.claim(right.epoch(), nonce);
                println!("{}", Event::won(&claim));
                let holding = Holding::new(directory.to_owned(), store.clone(), host.clone(), claim, right);
                holding.free(STORE_LIMIT).map_err(|why| anyhow!("cannot free what was won: {why}"))?;
            }
            Err(Refused::Others(_) | Refused::AliveHere(_) | Refused::Contended) => {}
            Err(why) => bail!("{why:?}"),
        }
    }
    Ok(())
}

/// The store, telling of every claim that it finds to be its own: an earlier request for it has won, unheard of.
struct Telling(DirectoryStore);

impl ClaimStore for Telling {
    fn claim(&self, claim: &Claim) -> ClaimAnswer {
        let answer = self.0.claim(claim);
        if matches!(&answer, ClaimAnswer::Exists(Occupant::Claim(found)) if found == claim) {
            println!("{}", Event::found(claim));
        }
        answer
    }

    fn newest(&self) -> Reading {
        self.0.newest()
    }

    fn mark(&self, epoch: Epoch, marker: Marker) -> MarkAnswer {
        self.0.mark(epoch, marker)
    }
}
