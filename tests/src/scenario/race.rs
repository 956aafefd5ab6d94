//! Both hosts claim one machine again and again while the NFS server comes and goes. Every epoch must have exactly one winner:
//! the one that its entry names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use godwit_core::ownership::claim::Claim;
use serde_json::{Value, json};

use crate::godwit::Ended;
use crate::lab::Lab;
use crate::lab::remote::Remote;
use crate::scenario::outage::{Manner, Outage};
use crate::scenario::run::step;

/// Where they race.
const DIRECTORY: &str = "/srv/godwit/race.godwit";
/// Who does.
const HOSTS: [&str; 2] = ["kvm1", "kvm2"];
/// How many on each host.
const RACERS: usize = 2;
/// For how long. Clients take up to ten seconds to find the server again.
const LENGTH: Duration = Duration::from_secs(60);
/// The server goes so often, each time after a while, for a while.
const OUTAGES: [Manner; 3] = [Manner::Silent, Manner::Stopped, Manner::Silent];
const BETWEEN: Duration = Duration::from_secs(5);
const AWAY: Duration = Duration::from_secs(3);
/// How long they may take to end when the time is over.
const END_LIMIT: Duration = Duration::from_secs(180);
/// With fewer epochs hardly anybody has raced.
const MIN_EPOCHS: usize = 20;

/// What a racer tells, one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    kind: Kind,
    epoch: u64,
    instance: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The right to run was won.
    Won,
    /// A claim was found to be its own already.
    Found,
}

impl Event {
    /// The right to run came with this claim.
    pub fn won(claim: &Claim) -> Self {
        Self::of(Kind::Won, claim)
    }

    /// An earlier request for this claim had won.
    pub fn found(claim: &Claim) -> Self {
        Self::of(Kind::Found, claim)
    }

    fn of(kind: Kind, claim: &Claim) -> Self {
        Self { kind, epoch: claim.epoch.get(), instance: claim.claimant.instance.to_string() }
    }
}

impl Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.kind {
            Kind::Won => "won",
            Kind::Found => "found",
        };
        write!(f, "{word} {} {}", self.epoch, self.instance)
    }
}

impl FromStr for Event {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let kind = match words.first() {
            Some(&"won") => Some(Kind::Won),
            Some(&"found") => Some(Kind::Found),
            _ => None,
        };
        let (Some(kind), [_, epoch, instance]) = (kind, &words[..]) else {
            return Err(Error::msg(format!("a racer said `{line}`")));
        };
        Ok(Self { kind, epoch: epoch.parse()?, instance: (*instance).to_owned() })
    }
}

/// How a race went.
#[derive(Debug, Clone)]
pub struct RaceSeen {
    epochs: usize,
    /// By host.
    wins: BTreeMap<String, usize>,
    /// Claims that an earlier request had won.
    found: usize,
}

impl RaceSeen {
    /// The same for programs.
    pub fn json(&self) -> Value {
        json!({ "epochs": self.epochs, "wins": self.wins, "found_own": self.found, "outages": OUTAGES.len() })
    }
}

/// Has both hosts race.
pub(crate) fn play(lab: &Lab) -> Result<RaceSeen> {
    step("both hosts race for claims while the NFS server comes and goes");
    let storage = lab.host("storage")?;
    storage.check(&format!("mkdir {DIRECTORY}"))?;
    let line = format!("lab-guest claim-race {DIRECTORY} {}", LENGTH.as_secs());
    let mut racers: Vec<(&str, Remote)> = Vec::new();
    for host in HOSTS {
        for number in 0..RACERS {
            racers.push((host, lab.host(host)?.spawn(&format!("racer-{number}"), &line)?));
        }
    }
    for manner in OUTAGES {
        thread::sleep(BETWEEN);
        let outage = Outage::begin(lab, manner)?;
        thread::sleep(AWAY);
        outage.end()?;
    }
    let mut events = Vec::new();
    for (host, racer) in &mut racers {
        let ended =
            Ended::wait(racer.process(), END_LIMIT)?.ensure_code(0).with_context(|| format!("a racer on {host}"))?;
        for line in ended.stdout.lines() {
            events.push(((*host).to_owned(), line.parse()?));
        }
    }
    // As the server's own file system has them.
    let entries = storage.check(&format!("find {DIRECTORY} -type l -name '*[0-9]' -printf '%l\\n'"))?;
    let entries: Vec<Claim> =
        entries.lines().map(str::parse).collect::<Result<_, _>>().context("not every entry is a claim")?;
    let seen = judge(&events, &entries)?;
    ensure!(seen.epochs >= MIN_EPOCHS && HOSTS.iter().all(|host| seen.wins.contains_key(*host)), "no race: {seen:?}");
    let RaceSeen { epochs, wins, found } = &seen;
    step(&format!("{epochs} epochs, one winner each ({wins:?}); {found} claims had been won by an earlier request"));
    storage.check(&format!("rm -r {DIRECTORY}"))?;
    Ok(seen)
}

/// Compares what the racers told, each with its host, with the entries that are there.
fn judge(events: &[(String, Event)], entries: &[Claim]) -> Result<RaceSeen> {
    let mut winners: BTreeMap<u64, &str> = BTreeMap::new();
    let mut wins = BTreeMap::new();
    for (host, event) in events.iter().filter(|(_, event)| event.kind == Kind::Won) {
        let earlier = winners.insert(event.epoch, &event.instance);
        ensure!(earlier.is_none(), "epoch {} was won twice: by {} and {earlier:?}", event.epoch, event.instance);
        *wins.entry(host.clone()).or_default() += 1;
    }
    let named: BTreeMap<u64, &str> =
        entries.iter().map(|claim| (claim.epoch.get(), claim.claimant.instance.as_str())).collect();
    let epochs: BTreeSet<u64> = winners.keys().chain(named.keys()).copied().collect();
    for epoch in &epochs {
        let (won, named) = (winners.get(epoch), named.get(epoch));
        ensure!(won == named, "epoch {epoch} was won by {won:?}; its entry names {named:?}");
    }
    let found = events.iter().filter(|(_, event)| event.kind == Kind::Found).count();
    Ok(RaceSeen { epochs: epochs.len(), wins, found })
}

#[cfg(test)]
mod tests {
    use godwit_core::ownership::{Claimant, Epoch, Nonce};

    use super::*;

    fn claim(epoch: u64, instance: &str) -> Claim {
        let name = |text: &str| text.parse().unwrap();
        let me = Claimant { machine: name("race"), host: name("h"), boot_id: name("b"), instance: name(instance) };
        me.claim(Epoch::new(epoch).unwrap(), Nonce(epoch))
    }

    fn told(host: &str, event: Event) -> (String, Event) {
        (host.into(), event.to_string().parse().unwrap())
    }

    #[test]
    fn a_winner_for_each_entry_is_a_good_race() {
        let entries = [claim(1, "a"), claim(2, "b")];
        let events = [
            told("kvm1", Event::won(&entries[0])),
            told("kvm2", Event::found(&entries[1])),
            told("kvm2", Event::won(&entries[1])),
        ];
        let seen = judge(&events, &entries).unwrap().json();
        assert_eq!(seen, json!({ "epochs": 2, "wins": { "kvm1": 1, "kvm2": 1 }, "found_own": 1, "outages": 3 }));
    }

    #[test]
    fn two_winners_no_winner_and_the_wrong_one_are_noticed() {
        let won = |host: &str, epoch, instance: &str| told(host, Event::won(&claim(epoch, instance)));
        let entry = [claim(1, "a")];
        for (events, why) in [
            (vec![won("kvm1", 1, "a"), won("kvm2", 1, "b")], "won twice"),
            (vec![won("kvm1", 1, "a"), won("kvm1", 1, "a")], "won twice"),
            (vec![won("kvm2", 1, "b")], "its entry names Some(\"a\")"),
            (vec![won("kvm1", 1, "a"), won("kvm2", 2, "b")], "its entry names None"),
            (vec![], "won by None"),
        ] {
            let error = judge(&events, &entry).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn what_no_racer_says_is_an_error() {
        for line in ["", "won", "won 1", "won x a", "lost 1 a", "won 1 a b"] {
            assert!(line.parse::<Event>().is_err(), "{line}");
        }
    }
}
