//! What it costs to move memory that the guest has used and freed: with a balloon by which it gives that back, and without.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::scenario::run::step;
use crate::scenario::stage::{self, Keeper, Moved};

/// How much memory the guest fills with random bytes and frees.
const USED_MIB: u64 = 200;

/// How long it then has to report. Linux begins after two seconds and reports a part of what is free every two seconds.
const REPORTING: Duration = Duration::from_secs(30);

/// How much of it must not be sent.
const SAVED_MIB: u64 = 150;

/// What the two moves cost.
#[derive(Debug, Clone)]
pub struct FreePagesSeen {
    /// With a balloon.
    pub with: Moved,
    /// Without.
    pub without: Moved,
}

/// Boots `fw1` twice, with a balloon and without, and moves it each time after it has used memory and freed it.
pub(crate) fn play(lab: &Lab) -> Result<FreePagesSeen> {
    step(&format!("with a balloon: fw1 fills {USED_MIB} MiB of memory, frees it, and moves"));
    let with = used_and_moved(lab, true).context("with a balloon")?;
    step("the same without a balloon");
    let without = used_and_moved(lab, false).context("without a balloon")?;
    Ok(FreePagesSeen { with, without })
}

fn used_and_moved(lab: &Lab, balloon: bool) -> Result<Moved> {
    let mut source = Keeper::boot_as(lab, lab.host("kvm1")?, &stage::definition(balloon))?;
    stage::guest(lab)?.use_memory(USED_MIB)?;
    thread::sleep(REPORTING);
    let mut destination = Keeper::receive(lab.host("kvm2")?, "tcp", "")?;
    let moved = source.move_to(&mut destination)?;
    destination.power_down()?;
    Ok(moved)
}

impl FreePagesSeen {
    /// What is wrong with it, if something is.
    pub fn fault(&self) -> Option<String> {
        let (with, without) = (self.with.wire_bytes >> 20, self.without.wire_bytes >> 20);
        (with + SAVED_MIB > without).then(|| {
            format!(
                "with a balloon {with} MiB went over the wire, without {without}: {SAVED_MIB} MiB less are expected"
            )
        })
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let figures = |moved: &Moved| {
            json!({
                "wire_bytes": moved.wire_bytes,
                "total_ms": moved.total_ms.round(),
                "downtime_ms": moved.downtime_ms.round(),
            })
        };
        json!({ "used_mib": USED_MIB, "with_balloon": figures(&self.with), "without": figures(&self.without) })
    }

    /// For people.
    pub fn table(&self) -> String {
        let line = |name: &str, moved: &Moved| {
            format!("{name:<17} {:>5} MiB  {:>6.2} s\n", moved.wire_bytes >> 20, moved.total_ms / 1000.0)
        };
        format!("{USED_MIB} MiB used and freed before a move:\n")
            + &line("with a balloon", &self.with)
            + &line("without a balloon", &self.without)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_saved_is_a_fault() {
        let moved = |mib: u64| Moved { begun_ns: 0, total_ms: 1.0, downtime_ms: 1.0, wire_bytes: mib << 20 };
        let seen = |with, without| FreePagesSeen { with: moved(with), without: moved(without) };
        assert_eq!(seen(150, 300).fault(), None);
        assert!(seen(151, 300).fault().unwrap().contains("151 MiB"));
    }
}
