//! The lab's figures judged: what was required, what was seen, and every way in which they differ.

use serde_json::{Value, json};

use crate::scenario::announce::{Frame, Kind};
use crate::scenario::free_pages::FreePagesSeen;
use crate::scenario::guest::Steps;
use crate::scenario::image::Fsck;
use crate::scenario::klog::{self, Line};
use crate::scenario::offset::ClockChange;
use crate::scenario::race::RaceSeen;
use crate::scenario::record::RecordsError;

/// How much longer than the pause a client may see silence, beside what it sees without a move: emulated hosts are slow.
pub const GAP_ALLOWANCE_MS: f64 = 1000.0;

/// By how much the guest's clock may change against its host's.
pub const CLOCK_LIMIT_MS: f64 = 50.0;

/// What one move looked like from outside.
#[derive(Debug, Clone)]
pub struct MoveSeen {
    /// The host that the machine left.
    pub from: String,
    /// The host that it went to.
    pub to: String,
    /// What it went over.
    pub transport: String,
    /// From the command until the move was seen completed.
    pub total_ms: f64,
    /// What the mover itself says.
    pub downtime_ms: f64,
    /// The client's longest interval between replies.
    pub client_gap_ms: f64,
    /// The same over as long a time without a move.
    pub baseline_gap_ms: f64,
    /// Requests that were never answered.
    pub pings_lost: usize,
    /// Why the forwarded connection is broken, if it is.
    pub tcp_broken: Option<String>,
    /// What was wrong with the numbers on it, if something was.
    pub tcp_wrong: Option<String>,
    /// Records confirmed while the move was watched.
    pub records: u64,
    /// Whether all that were confirmed by its end are on the image.
    pub disk_records: Result<u64, RecordsError>,
    /// What announced the machine.
    pub announces: Vec<Frame>,
    /// What happened to the guest's clock.
    pub clock: ClockChange,
    /// Whether the guest is still in the boot that it was in.
    pub same_boot: bool,
}

/// A whole run of the scenario.
#[derive(Debug, Clone)]
pub struct RunSeen {
    /// The moves, in order.
    pub moves: Vec<MoveSeen>,
    /// The image after power-off.
    pub fsck: Fsck,
    /// The guest's warnings at the end.
    pub klog: Vec<Line>,
    /// Those of a run without a move.
    pub control_klog: Vec<Line>,
    /// What the guest's samplers saw of its clocks.
    pub steps: Steps,
    /// The race for claims, if it was run.
    pub race: Option<RaceSeen>,
    /// How long a reboot took, if there was one.
    pub reboot_ms: Option<f64>,
    /// What freed memory cost, if that was tried.
    pub free_pages: Option<FreePagesSeen>,
}

impl MoveSeen {
    /// How it differs from what is required.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let limit_ms = self.downtime_ms + self.baseline_gap_ms + GAP_ALLOWANCE_MS;
        if !is_at_most(self.client_gap_ms, limit_ms) {
            faults.push(format!(
                "the client's gap of {:.0} ms is longer than {limit_ms:.0} ms ({:.0} downtime, {:.0} without a move, \
                 {GAP_ALLOWANCE_MS:.0} allowed)",
                self.client_gap_ms, self.downtime_ms, self.baseline_gap_ms
            ));
        }
        faults.extend(self.tcp_broken.iter().map(|why| format!("the forwarded connection broke: {why}")));
        faults.extend(self.tcp_wrong.iter().map(|what| format!("the forwarded connection lost count: {what}")));
        if let Err(error) = &self.disk_records {
            faults.push(format!("confirmed records are not on the image: {error}"));
        }
        if self.records == 0 {
            faults.push("no record was confirmed meanwhile".into());
        }
        if self.announces.is_empty() {
            faults.push("nothing announced the machine on the public network".into());
        }
        let ClockChange { change_ms, uncertainty_ms } = self.clock;
        if !is_at_most(change_ms.abs(), CLOCK_LIMIT_MS) {
            faults.push(format!("the guest's clock changed by {change_ms:.1} ms (±{uncertainty_ms:.1} ms)"));
        } else if !is_at_most(uncertainty_ms, CLOCK_LIMIT_MS) {
            faults.push(format!("the guest's clock could only be told to ±{uncertainty_ms:.1} ms"));
        }
        if !self.same_boot {
            faults.push("the guest has rebooted".into());
        }
        faults.iter().map(|fault| format!("{} → {} over {}: {fault}", self.from, self.to, self.transport)).collect()
    }

    /// What the lab tells of it.
    pub fn json(&self, fsck: &Fsck) -> Value {
        let count = |kind: Kind| self.announces.iter().filter(|frame| frame.kind == kind).count();
        json!({
            "from": self.from,
            "to": self.to,
            "transport": self.transport,
            "total_ms": rounded(self.total_ms),
            "downtime_ms": rounded(self.downtime_ms),
            "client_gap_ms": rounded(self.client_gap_ms),
            "baseline_gap_ms": rounded(self.baseline_gap_ms),
            "pings_lost": self.pings_lost,
            "tcp_connection": self.tcp_broken.as_ref().map_or("alive".into(), |why| format!("broken: {why}")),
            "tcp_counter": self.tcp_wrong.as_ref().map_or("complete".into(), |what| format!("incomplete: {what}")),
            "disk_records": match &self.disk_records {
                Ok(_) => "complete".into(),
                Err(error) => format!("incomplete: {error}"),
            },
            "records": self.records,
            "fsck": match fsck {
                Fsck::Clean => "clean",
                Fsck::Errors(said) => said,
            },
            "announce_frames": self.announces.len(),
            "announce_rarp": count(Kind::Rarp),
            "announce_arp": count(Kind::ArpRequest) + count(Kind::ArpReply),
            "announce_neighbour": count(Kind::NeighbourAdvertisement),
            "clock_change_ms": rounded(self.clock.change_ms),
            "clock_uncertainty_ms": rounded(self.clock.uncertainty_ms),
        })
    }
}

impl RunSeen {
    /// Every way in which the run differs from what is required.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.moves.iter().flat_map(MoveSeen::faults).collect();
        if let Fsck::Errors(said) = &self.fsck {
            faults.push(format!("the file system on the image is not in order: {said}"));
        }
        let new = klog::beyond(&self.klog, &self.control_klog);
        faults.extend(new.iter().map(|line| format!("the guest's kernel warns: {line}")));
        if self.steps.samples == 0 {
            faults.push("the guest's clocks were not watched".into());
        }
        if self.steps.backward > 0 {
            let Steps { backward, worst_ns, .. } = self.steps;
            faults.push(format!("the guest's monotonic clock went back {backward} times, by {worst_ns} ns at most"));
        }
        faults.extend(self.free_pages.as_ref().and_then(FreePagesSeen::fault));
        faults
    }

    /// The lab's last line.
    pub fn json(&self) -> Value {
        let moves: Vec<Value> = self.moves.iter().map(|seen| seen.json(&self.fsck)).collect();
        let warnings = klog::beyond(&self.klog, &self.control_klog).len();
        json!({
            "moves": moves,
            "new_kernel_warnings": warnings,
            "monotonic_samples": self.steps.samples,
            "monotonic_backward": self.steps.backward,
            "claim_race": self.race.as_ref().map(RaceSeen::json),
            "reboot_ms": self.reboot_ms.map(rounded),
            "free_pages": self.free_pages.as_ref().map(FreePagesSeen::json),
            "faults": self.faults(),
        })
    }

    /// The same for people.
    pub fn table(&self) -> String {
        let mut table = String::from(
            "from    to      over   total      downtime   client's gap  without move  lost  records  announced  clock\n",
        );
        for seen in &self.moves {
            table += &format!(
                "{:<7} {:<7} {:<5} {:>7.2} s  {:>7.0} ms  {:>9.0} ms  {:>9.0} ms  {:>4}  {:>7}  {:>9}  {:+.1} ms\n",
                seen.from,
                seen.to,
                seen.transport,
                seen.total_ms / 1000.0,
                seen.downtime_ms,
                seen.client_gap_ms,
                seen.baseline_gap_ms,
                seen.pings_lost,
                seen.records,
                seen.announces.len(),
                seen.clock.change_ms,
            );
        }
        if let Some(seen) = &self.free_pages {
            table += &seen.table();
        }
        let faults = self.faults();
        if faults.is_empty() {
            return table + "all as required: connection alive, numbers and records complete, file system clean\n";
        }
        faults.iter().fold(table, |table, fault| format!("{table}NOT AS REQUIRED: {fault}\n"))
    }
}

/// Whether a figure keeps its limit. One that is not a number does not.
fn is_at_most(figure: f64, limit: f64) -> bool {
    figure <= limit
}

fn rounded(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> RunSeen {
        let seen = MoveSeen {
            from: "kvm1".into(),
            to: "kvm2".into(),
            transport: "tcp".into(),
            total_ms: 9000.0,
            downtime_ms: 250.0,
            client_gap_ms: 700.0,
            baseline_gap_ms: 40.0,
            pings_lost: 30,
            tcp_broken: None,
            tcp_wrong: None,
            records: 200,
            disk_records: Ok(900),
            announces: vec![Frame { at_ns: 1, kind: Kind::Rarp }, Frame { at_ns: 2, kind: Kind::ArpReply }],
            clock: ClockChange { change_ms: -3.0, uncertainty_ms: 8.0 },
            same_boot: true,
        };
        let warning = Line { level: 4, at_us: 7, text: "hpet: slow".into() };
        RunSeen {
            moves: vec![seen],
            fsck: Fsck::Clean,
            klog: vec![warning.clone()],
            control_klog: vec![warning],
            steps: Steps { samples: 100_000, backward: 0, worst_ns: 0 },
            race: None,
            reboot_ms: Some(81_000.0),
            free_pages: None,
        }
    }

    #[test]
    fn a_good_run_has_no_fault() {
        let run = good();
        assert_eq!(run.faults(), Vec::<String>::new());
        assert!(run.table().contains("all as required"), "{}", run.table());
        let json = &run.json()["moves"][0];
        let expected = json!({
            "from": "kvm1", "to": "kvm2", "transport": "tcp", "total_ms": 9000.0, "downtime_ms": 250.0,
            "client_gap_ms": 700.0, "baseline_gap_ms": 40.0, "pings_lost": 30, "tcp_connection": "alive",
            "tcp_counter": "complete", "disk_records": "complete", "records": 200, "fsck": "clean",
            "announce_frames": 2,
        });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&json[key], value, "{key}");
        }
    }

    #[test]
    fn everything_that_is_not_as_required_is_a_fault() {
        type Spoiler = (&'static str, fn(&mut RunSeen));
        let spoilers: [Spoiler; 15] = [
            ("the client's gap of 1291 ms", |run| run.moves[0].client_gap_ms = 1291.0),
            ("the client's gap of NaN ms", |run| run.moves[0].client_gap_ms = f64::NAN),
            ("connection broke: reset", |run| run.moves[0].tcp_broken = Some("reset".into())),
            ("lost count: 4 followed 2", |run| run.moves[0].tcp_wrong = Some("4 followed 2".into())),
            ("899 records were found, 900 were", |run| {
                run.moves[0].disk_records = Err(RecordsError::Missing { found: 899, confirmed: 900 });
            }),
            ("no record was confirmed", |run| run.moves[0].records = 0),
            ("nothing announced", |run| run.moves[0].announces.clear()),
            ("clock changed by 51.0 ms", |run| run.moves[0].clock.change_ms = 51.0),
            ("clock changed by -51.0 ms", |run| run.moves[0].clock.change_ms = -51.0),
            ("only be told to ±60.0 ms", |run| run.moves[0].clock.uncertainty_ms = 60.0),
            ("rebooted", |run| run.moves[0].same_boot = false),
            ("not in order: bad inode", |run| run.fsck = Fsck::Errors("bad inode".into())),
            ("the guest's kernel warns: 4 7 soft lockup", |run| run.klog[0].text = "soft lockup".into()),
            ("went back 2 times, by 40 ns", |run| {
                run.steps = Steps { samples: 9, backward: 2, worst_ns: 40 };
            }),
            ("clocks were not watched", |run| run.steps.samples = 0),
        ];
        for (expected, spoil) in spoilers {
            let mut run = good();
            spoil(&mut run);
            let faults = run.faults();
            assert!(faults.len() == 1 && faults[0].contains(expected), "{expected}: {faults:?}");
            assert!(run.table().contains("NOT AS REQUIRED"));
        }
    }

    #[test]
    fn a_gap_at_the_limit_is_good_enough() {
        let mut run = good();
        run.moves[0].client_gap_ms = 1290.0;
        assert_eq!(run.faults(), Vec::<String>::new());
    }
}
