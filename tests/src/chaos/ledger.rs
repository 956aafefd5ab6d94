//! Who runs the guest, told from heartbeats alone. Pure: samples in, conclusions out.
//!
//! Copies of the guest's pages carry heartbeats, too: a destination's counter moves before the guest runs there. That it *runs* is
//! proven in one of two ways. Its counter is ahead of a value that the source was seen with later: no copy can be. Or it moved in
//! so many samples in a row as only a vCPU moves it: a copy of a page comes once a round.
//!
//! One machine is run by one process after the other, and never again by an earlier one: a process that moved its machine away, or
//! lost it, has ended it for good, and a machine that comes back does so in a new process. So there is no need to compare windows of
//! time: whoever advances after another was proven to run is one too many.

use std::collections::BTreeMap;

/// Samples in a row in which a counter has to have moved, for a time that spans at least [`STREAK_NS`].
const STREAK_SAMPLES: u32 = 16;
const STREAK_NS: u64 = 2_000_000;

/// A process that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u32);

/// Two that ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// Who went on,
    pub earlier: String,
    /// after this one had begun.
    pub later: String,
    /// When that was first seen, by CLOCK_MONOTONIC.
    pub at_ns: u64,
}

/// One look at a counter.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Before it was read.
    pub from_ns: u64,
    /// After it was read.
    pub to_ns: u64,
    /// What was read.
    pub value: u64,
}

/// What is known of all processes of one machine.
#[derive(Debug, Default)]
pub struct Ledger {
    processes: BTreeMap<Id, Watched>,
    runner: Option<Id>,
    overlaps: Vec<Overlap>,
    added: u32,
}

#[derive(Debug)]
struct Watched {
    name: String,
    /// Whose pages may be copied into it.
    origin: Option<Id>,
    last: Option<Sample>,
    /// How often in a row, and since when, its counter has moved.
    streak: (u32, u64),
    /// When it was first proven to run.
    proven_ns: Option<u64>,
    /// When it was last seen to advance while it runs.
    advanced_ns: Option<u64>,
    /// When another was proven to run after it.
    succeeded_ns: Option<u64>,
    accused: bool,
}

impl Ledger {
    /// A further process. `origin` is the one whose machine it may take in.
    pub fn add(&mut self, name: &str, origin: Option<Id>) -> Id {
        let id = Id(self.added);
        self.added += 1;
        let watched = Watched {
            name: name.to_owned(),
            origin,
            last: None,
            streak: (0, 0),
            proven_ns: None,
            advanced_ns: None,
            succeeded_ns: None,
            accused: false,
        };
        self.processes.insert(id, watched);
        id
    }

    /// A receiver waits for another process's machine from now on.
    pub fn set_origin(&mut self, id: Id, origin: Id) {
        if let Some(watched) = self.processes.get_mut(&id) {
            watched.origin = Some(origin);
        }
    }

    /// The process has ended.
    pub fn remove(&mut self, id: Id) {
        self.processes.remove(&id);
    }

    /// Its memory has gone. What comes next is another machine, or another copy.
    pub fn memory_gone(&mut self, id: Id) {
        if let Some(watched) = self.processes.get_mut(&id) {
            watched.last = None;
            watched.streak = (0, 0);
            watched.proven_ns = None;
        }
    }

    /// A look at `id`'s counter. Looks come in the order of time.
    pub fn sample(&mut self, id: Id, sample: Sample) {
        self.prove_those_ahead_of(id, sample);
        let Some(watched) = self.processes.get_mut(&id) else { return };
        let Some(before) = watched.last.replace(sample) else { return };
        if sample.value == before.value {
            watched.streak = (0, 0);
            return;
        }
        watched.streak = match watched.streak {
            (0, _) => (1, before.to_ns),
            (count, since) => (count + 1, since),
        };
        let (count, since) = watched.streak;
        let by_itself = watched.origin.is_none() || (count >= STREAK_SAMPLES && sample.to_ns - since >= STREAK_NS);
        if watched.proven_ns.is_some() || by_itself {
            self.advanced(id, before.from_ns, sample.to_ns);
        }
    }

    /// When `id` was first proven to run.
    pub fn proven_ns(&self, id: Id) -> Option<u64> {
        self.processes.get(&id)?.proven_ns
    }

    /// When `id` was last seen to advance, running.
    pub fn advanced_ns(&self, id: Id) -> Option<u64> {
        self.processes.get(&id)?.advanced_ns
    }

    /// Gives the overlaps that were found since the last call.
    pub fn take_overlaps(&mut self) -> Vec<Overlap> {
        std::mem::take(&mut self.overlaps)
    }

    /// A receiver whose counter was, before this sample of its source, ahead of it.
    fn prove_those_ahead_of(&mut self, source: Id, sample: Sample) {
        let ahead =
            self.processes.iter().filter(|(_, watched)| watched.origin == Some(source) && watched.proven_ns.is_none());
        let ahead = ahead.filter_map(|(&id, watched)| Some((id, watched.last?)));
        let ahead: Vec<_> =
            ahead.filter(|(_, last)| last.value > sample.value && last.to_ns <= sample.from_ns).collect();
        for (id, last) in ahead {
            self.advanced(id, last.from_ns, last.to_ns);
        }
    }

    fn advanced(&mut self, id: Id, after_ns: u64, at_ns: u64) {
        let later = self.runner.and_then(|runner| self.processes.get(&runner)).map(|runner| runner.name.clone());
        let Some(watched) = self.processes.get_mut(&id) else { return };
        watched.proven_ns.get_or_insert(at_ns);
        watched.advanced_ns = Some(at_ns);
        match watched.succeeded_ns {
            // It stopped somewhere between two looks, which is early enough.
            Some(succeeded_ns) if after_ns < succeeded_ns => {}
            Some(_) if watched.accused => {}
            Some(_) => {
                watched.accused = true;
                let earlier = watched.name.clone();
                self.overlaps.push(Overlap { earlier, later: later.unwrap_or_default(), at_ns });
            }
            None => {
                let before = self.runner.replace(id).filter(|&before| before != id);
                if let Some(before) = before.and_then(|before| self.processes.get_mut(&before)) {
                    before.succeeded_ns = Some(at_ns);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Id = Id(0);
    const DESTINATION: Id = Id(1);

    /// One look at each every 200 µs.
    struct Looks {
        ledger: Ledger,
        now_ns: u64,
    }

    impl Looks {
        fn new() -> Self {
            let mut ledger = Ledger::default();
            assert_eq!(ledger.add("source", None), SOURCE);
            assert_eq!(ledger.add("destination", Some(SOURCE)), DESTINATION);
            Self { ledger, now_ns: 0 }
        }

        fn look(&mut self, source: u64, destination: u64) {
            for (id, value) in [(SOURCE, source), (DESTINATION, destination)] {
                let from_ns = self.now_ns;
                self.now_ns += 10_000;
                self.ledger.sample(id, Sample { from_ns, to_ns: self.now_ns, value });
            }
            self.now_ns += 180_000;
        }

        fn runs(&self) -> [bool; 2] {
            [SOURCE, DESTINATION].map(|id| self.ledger.proven_ns(id).is_some())
        }
    }

    #[test]
    fn a_move_is_no_overlap_and_copies_do_not_run() {
        let mut looks = Looks::new();
        for tick in 1..100 {
            // A copy comes every fifth look.
            looks.look(tick * 10, tick / 5 * 50);
        }
        assert_eq!(looks.runs(), [true, false]);
        for _ in 0..10 {
            looks.look(1000, 990);
        }
        looks.look(1000, 1000);
        assert_eq!(looks.runs(), [true, false], "the last copy is what the source stopped at");
        for tick in 1..10 {
            looks.look(1000, 1000 + tick);
        }
        assert_eq!(looks.runs(), [true, true]);
        assert_eq!(looks.ledger.take_overlaps(), []);
        let (stopped, begun) = (looks.ledger.advanced_ns(SOURCE), looks.ledger.proven_ns(DESTINATION));
        assert!(stopped < begun);
    }

    #[test]
    fn a_source_that_goes_on_is_found() {
        let mut looks = Looks::new();
        looks.look(10, 0);
        looks.look(20, 20);
        looks.look(20, 21);
        looks.look(20, 22);
        assert_eq!(looks.ledger.take_overlaps(), []);
        looks.look(21, 23);
        let overlaps = looks.ledger.take_overlaps();
        assert_eq!(overlaps.len(), 1);
        assert_eq!((overlaps[0].earlier.as_str(), overlaps[0].later.as_str()), ("source", "destination"));
        looks.look(22, 24);
        assert_eq!(looks.ledger.take_overlaps(), [], "told once");
    }

    #[test]
    fn a_destination_that_runs_behind_a_resumed_source_is_found() {
        let mut looks = Looks::new();
        looks.look(10, 0);
        looks.look(1000, 10);
        for tick in 0..30 {
            looks.look(1000 + tick, 10 + tick);
        }
        let overlaps = looks.ledger.take_overlaps();
        assert_eq!(overlaps.len(), 1, "the counter of the destination moves as a vCPU moves it");
    }

    #[test]
    fn a_source_that_stops_between_two_late_looks_is_no_overlap() {
        let mut looks = Looks::new();
        looks.look(10, 0);
        // The sampler was kept waiting between the two: the source went on after its look, and the destination has begun.
        looks.look(20, 31);
        looks.look(30, 40);
        looks.look(30, 50);
        assert_eq!(looks.runs(), [true, true]);
        assert_eq!(looks.ledger.take_overlaps(), []);
    }

    #[test]
    fn memory_that_was_dropped_and_comes_again_proves_nothing() {
        let mut looks = Looks::new();
        looks.look(10, 5);
        looks.ledger.memory_gone(DESTINATION);
        looks.look(20, 15);
        looks.look(30, 25);
        assert_eq!(looks.runs(), [true, false]);
    }
}
