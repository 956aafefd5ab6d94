//! The gap in a guest's heartbeat: pure arithmetic over what a sampler saw.
//!
//! A gap is the first time at which the destination's counter exceeds the source's *final* value, minus the last time
//! at which the source's counter changed. Page copies carry old counter values to the destination before the guest
//! runs there; they never exceed the final value, so they do not count. With several vCPUs the largest gap counts.

/// A counter was first seen with a new value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// When the sample before this one was taken: the change happened after it.
    pub after_ns: u64,
    /// When this sample was taken: the change had happened.
    pub at_ns: u64,
    /// The new value.
    pub value: u64,
}

/// One vCPU's heartbeat in one process.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    changes: Vec<Change>,
    last_sample_ns: Option<u64>,
}

impl Trace {
    /// Adds a sample. Samples come in the order of time.
    pub fn sample(&mut self, at_ns: u64, value: u64) {
        let before = self.last_sample_ns.replace(at_ns);
        if self.changes.last().is_none_or(|last| last.value != value) {
            self.changes.push(Change { after_ns: before.unwrap_or(at_ns), at_ns, value });
        }
    }

    /// The last change seen.
    pub fn last_change(&self) -> Option<Change> {
        self.changes.last().copied()
    }

    /// When the latest sample was taken.
    pub fn last_sample_ns(&self) -> Option<u64> {
        self.last_sample_ns
    }

    /// The first sample that showed more than `value`.
    pub fn first_above(&self, value: u64) -> Option<Change> {
        self.changes.iter().find(|change| change.value > value).copied()
    }
}

/// A measured gap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// By the rule: between two samples.
    pub gap_ms: f64,
    /// How far the truth may be from it, because samples are taken some time apart.
    pub uncertainty_ms: f64,
}

/// Why there is no gap to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoGap {
    /// The source's counter was never seen.
    SourceNeverSeen,
    /// The source's memory was not seen once more after its counter's last change: its final value is not known.
    SourceFinalValueUnknown,
    /// The destination's counter never exceeded the source's final value.
    DestinationNeverRan,
    /// No vCPU was watched.
    NoVcpu,
}

impl std::fmt::Display for NoGap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NoGap::SourceNeverSeen => "the source's heartbeat was never seen",
            NoGap::SourceFinalValueUnknown => {
                "the source's memory vanished before its heartbeat was seen to stand still"
            }
            NoGap::DestinationNeverRan => "the destination's heartbeat never went beyond the source's last value",
            NoGap::NoVcpu => "no vCPU was watched",
        })
    }
}

impl std::error::Error for NoGap {}

/// The gap of one vCPU.
pub fn gap(source: &Trace, destination: &Trace) -> Result<Gap, NoGap> {
    let stopped = source.last_change().ok_or(NoGap::SourceNeverSeen)?;
    if source.last_sample_ns() == Some(stopped.at_ns) {
        return Err(NoGap::SourceFinalValueUnknown);
    }
    let resumed = destination.first_above(stopped.value).ok_or(NoGap::DestinationNeverRan)?;
    let uncertainty_ns = (stopped.at_ns - stopped.after_ns).max(resumed.at_ns - resumed.after_ns);
    Ok(Gap { gap_ms: (resumed.at_ns as f64 - stopped.at_ns as f64) / 1e6, uncertainty_ms: uncertainty_ns as f64 / 1e6 })
}

/// The largest gap over all vCPUs, each a pair of source and destination.
pub fn largest_gap<'a>(vcpus: impl IntoIterator<Item = (&'a Trace, &'a Trace)>) -> Result<Gap, NoGap> {
    let mut largest = None::<Gap>;
    for (source, destination) in vcpus {
        let gap = gap(source, destination)?;
        if largest.is_none_or(|largest| gap.gap_ms > largest.gap_ms) {
            largest = Some(gap);
        }
    }
    largest.ok_or(NoGap::NoVcpu)
}

/// Whether some vCPU ran at the destination before all had stopped at the source.
pub fn overlaps<'a>(vcpus: impl Iterator<Item = (&'a Trace, &'a Trace)> + Clone) -> bool {
    let stopped = vcpus.clone().filter_map(|(source, _)| source.last_change()).map(|change| change.at_ns).max();
    let resumed = vcpus.filter_map(|(source, destination)| {
        let last = source.last_change().map_or(0, |change| change.value);
        destination.first_above(last).map(|change| change.at_ns)
    });
    resumed.min().zip(stopped).is_some_and(|(resumed, stopped)| resumed <= stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn trace(samples: &[(u64, u64)]) -> Trace {
        let mut trace = Trace::default();
        for &(at_ms, value) in samples {
            trace.sample(at_ms * MS, value);
        }
        trace
    }

    #[test]
    fn from_the_sources_last_change_to_the_first_higher_value() {
        let source = trace(&[(0, 10), (1, 20), (2, 30), (3, 30), (9, 30)]);
        let destination = trace(&[(4, 0), (8, 30), (12, 31), (13, 40)]);
        let gap = gap(&source, &destination).unwrap();
        assert_eq!(gap.gap_ms, 10.0);
        assert_eq!(gap.uncertainty_ms, 4.0, "between the samples at 8 and 12 ms");
    }

    #[test]
    fn page_copies_that_arrive_early_do_not_count() {
        let source = trace(&[(0, 10), (5, 50), (6, 50)]);
        // Copies of the page with values 10, 40 and 50 arrive; the guest runs from 20 ms on.
        let destination = trace(&[(1, 0), (2, 10), (4, 40), (7, 50), (20, 51)]);
        assert_eq!(gap(&source, &destination).unwrap().gap_ms, 15.0);
    }

    #[test]
    fn a_source_that_was_not_seen_standing_still_gives_no_figure() {
        let source = trace(&[(0, 10), (1, 20)]);
        let destination = trace(&[(2, 30)]);
        assert_eq!(gap(&source, &destination), Err(NoGap::SourceFinalValueUnknown));
    }

    #[test]
    fn a_destination_that_stands_still_gives_no_figure() {
        let source = trace(&[(0, 10), (1, 20), (2, 20)]);
        assert_eq!(gap(&source, &trace(&[(3, 20), (4, 20)])), Err(NoGap::DestinationNeverRan));
        assert_eq!(gap(&Trace::default(), &Trace::default()), Err(NoGap::SourceNeverSeen));
    }

    #[test]
    fn the_slowest_vcpu_counts() {
        let (fast, slow) = (trace(&[(0, 1), (5, 2), (6, 2)]), trace(&[(0, 1), (4, 2), (6, 2)]));
        let (fast_there, slow_there) = (trace(&[(6, 0), (7, 3)]), trace(&[(6, 0), (11, 3)]));
        let gap = largest_gap([(&fast, &fast_there), (&slow, &slow_there)]).unwrap();
        assert_eq!(gap.gap_ms, 7.0);
        assert_eq!(largest_gap([]), Err(NoGap::NoVcpu));
    }

    #[test]
    fn one_vcpu_that_runs_on_at_the_source_is_an_overlap() {
        let (early, late) = (trace(&[(0, 1), (5, 2), (20, 2)]), trace(&[(0, 1), (9, 2), (20, 2)]));
        let (first, second) = (trace(&[(6, 1), (8, 3)]), trace(&[(6, 1), (12, 3)]));
        assert!(overlaps([(&early, &first), (&late, &second)].into_iter()));
        let first = trace(&[(6, 1), (10, 3)]);
        assert!(!overlaps([(&early, &first), (&late, &second)].into_iter()));
    }

    #[test]
    fn one_vcpu_that_does_not_run_spoils_the_figure() {
        let source = trace(&[(0, 1), (5, 2), (6, 2)]);
        let runs = trace(&[(6, 0), (7, 3)]);
        let stands = trace(&[(6, 0), (7, 2)]);
        assert_eq!(largest_gap([(&source, &runs), (&source, &stands)]), Err(NoGap::DestinationNeverRan));
    }
}
