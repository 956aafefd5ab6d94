//! One case: the other program's best settings are found by a small tournament, then both move in turn.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::case::{Case, LINK_BYTES_PER_S, Link};
use super::moving::{Moved, by_godwit, by_other, raw_bytes_per_s};
use super::settings::Mover;
use crate::interrupt;

/// Moves of each setting in the tournament. The best counts, to the other program's favour.
const TRIES: usize = 2;

/// A case, compared.
pub struct Compared {
    case: Case,
    /// What its link takes, or the machine where there is none.
    bytes_per_s: f64,
    winner: String,
    tried: Vec<(String, Moved)>,
    godwit: Vec<Moved>,
    other: Vec<Moved>,
}

/// Finds the best of `candidates` for the case, then moves by Godwit and by the winner in turn. `say` is told each move.
pub fn compare(
    case: Case,
    candidates: &[Mover],
    pairs: u32,
    downtime_limit_ms: u64,
    mut say: impl FnMut(&str, &Moved),
) -> Result<Compared> {
    let mut tried: Vec<(&Mover, Moved)> = Vec::new();
    for mover in candidates {
        interrupt::check()?;
        let settings = mover.settings();
        let mut best = by_other(&case, mover, downtime_limit_ms)?;
        say(&settings, &best);
        for _ in 1..TRIES {
            // What was cut once is cut again.
            if best.cut.is_some() {
                break;
            }
            let again = by_other(&case, mover, downtime_limit_ms)?;
            say(&settings, &again);
            best = if again.total_ms < best.total_ms { again } else { best };
        }
        tried.push((mover, best));
    }
    let winner = tried.iter().min_by(|(_, one), (_, other)| one.total_ms.total_cmp(&other.total_ms));
    let winner = winner.map(|(mover, _)| *mover).context("there is nobody to compare with")?;
    let bytes_per_s = match case.link {
        Link::Uncapped => raw_bytes_per_s(&case)?,
        Link::Capped | Link::Shaped => LINK_BYTES_PER_S,
    };
    let (mut godwit, mut other) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        interrupt::check()?;
        let moved = by_godwit(&case, downtime_limit_ms)?;
        say("godwit", &moved);
        godwit.push(moved);
        let moved = by_other(&case, winner, downtime_limit_ms)?;
        say(&winner.settings(), &moved);
        other.push(moved);
    }
    let tried = tried.into_iter().map(|(mover, moved)| (mover.settings(), moved)).collect();
    Ok(Compared { case, bytes_per_s, winner: winner.settings(), tried, godwit, other })
}

impl Compared {
    /// What it would take to move the contents once and do nothing else.
    fn floor_total_ms(&self) -> f64 {
        (self.case.contents_pages * 4096) as f64 / self.bytes_per_s * 1e3
    }

    /// As `versus-qemu --json` shows it; `peer` is the other program's name. Ratios are of medians, Godwit's over the other's.
    pub fn json(&self, peer: &str) -> Value {
        let (godwit, other) = (Medians::of(&self.godwit), Medians::of(&self.other));
        let mut theirs = other.json();
        theirs["settings"] = json!(self.winner);
        let tried = self.tried.iter().map(|(name, moved)| {
            let mut row = Medians::of(std::slice::from_ref(moved)).json();
            row["settings"] = json!(name);
            row["cut"] = json!(moved.cut);
            row
        });
        json!({
            "case": self.case.name,
            "ratio_total": ratio(godwit.total_ms, other.total_ms),
            "ratio_gap": ratio(godwit.gap_ms, other.gap_ms),
            "ratio_bytes": ratio(godwit.wire_bytes, other.wire_bytes),
            "floor_total_ms": self.floor_total_ms(),
            "ratio_floor": ratio(godwit.total_ms, Some(self.floor_total_ms())),
            "godwit": godwit.json(),
            peer: theirs,
            "tried": tried.collect::<Vec<_>>(),
        })
    }

    /// A line for people.
    pub fn line(&self) -> String {
        let (godwit, other) = (Medians::of(&self.godwit), Medians::of(&self.other));
        let shown = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        format!(
            "{:<18} {:>8} {:>8} {:>6} | {:>7} {:>7} {:>6} | {:>7} {:>7} {:>6} | {:>8.0}  {}",
            self.case.name,
            shown(godwit.total_ms, 0),
            shown(other.total_ms, 0),
            shown(ratio(godwit.total_ms, other.total_ms), 2),
            shown(godwit.gap_ms, 1),
            shown(other.gap_ms, 1),
            shown(ratio(godwit.gap_ms, other.gap_ms), 2),
            shown(godwit.wire_bytes.map(|bytes| bytes / 1e6), 0),
            shown(other.wire_bytes.map(|bytes| bytes / 1e6), 0),
            shown(ratio(godwit.wire_bytes, other.wire_bytes), 2),
            self.floor_total_ms(),
            self.winner,
        )
    }

    /// What stands above [`Compared::line`]s.
    pub fn header(peer: &str) -> String {
        let (godwit, other) = ("godwit", &peer[..peer.len().min(7)]);
        format!(
            "{:<18} {:>24} | {:>22} | {:>22} | {:>8}\n{:<18} {:>8} {:>8} {:>6} | {:>7} {:>7} {:>6} | {:>7} {:>7} {:>6} | {:>8}  {peer}'s settings",
            "",
            "total ms",
            "gap ms",
            "MB on the wire",
            "floor",
            "case",
            godwit,
            other,
            "ratio",
            godwit,
            other,
            "ratio",
            godwit,
            other,
            "ratio",
            "ms",
        )
    }
}

/// Medians over several moves.
struct Medians {
    total_ms: Option<f64>,
    gap_ms: Option<f64>,
    wire_bytes: Option<f64>,
    cpu_s: Option<f64>,
    guest_rate_share: Option<f64>,
    cut: usize,
}

impl Medians {
    fn of(moves: &[Moved]) -> Self {
        let median_of = |value: fn(&Moved) -> Option<f64>| median(moves.iter().filter_map(value).collect());
        Self {
            total_ms: median_of(|moved| Some(moved.total_ms)),
            gap_ms: median_of(|moved| moved.gap_ms),
            wire_bytes: median_of(|moved| Some(moved.wire_bytes as f64)),
            cpu_s: median_of(|moved| Some(moved.cpu_s)),
            guest_rate_share: median_of(|moved| moved.guest_rate_share),
            cut: moves.iter().filter(|moved| moved.cut.is_some()).count(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "total_ms": self.total_ms,
            "gap_ms": self.gap_ms,
            "wire_bytes": self.wire_bytes,
            "cpu_s": self.cpu_s,
            "guest_rate_share": self.guest_rate_share,
            "cut": self.cut,
        })
    }
}

fn ratio(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? / other.filter(|other| *other > 0.0)?)
}

/// The middle one, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(values[middle - 1].midpoint(values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_move_that_was_cut_counts_with_its_time_and_has_no_gap() {
        let moved =
            |total_ms, gap_ms, cut| Moved { total_ms, gap_ms, wire_bytes: 10, cpu_s: 1.0, guest_rate_share: None, cut };
        let medians = Medians::of(&[moved(60e3, None, Some("cut".into())), moved(10.0, Some(3.0), None)]);
        assert_eq!((medians.total_ms, medians.gap_ms, medians.cut), (Some(30_005.0), Some(3.0), 1));
        assert_eq!(ratio(medians.guest_rate_share, Some(1.0)), None);
    }
}
