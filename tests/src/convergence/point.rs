//! Guests and links, drawn from ranges by a seed.
//!
//! Every parameter is drawn from its whole range. What is fixed beforehand is only how many points are to converge: a draw whose
//! own numbers (the writer's closed form, not a measurement) put it on the other side, or near the border, is drawn again.

use std::ops::RangeInclusive;
use std::time::Duration;

use fastrand::Rng;
use godwit_core::PAGE_SIZE;
use godwit_core::policy::Limits;
use godwit_core::predict::{
    Contents, Dirtying, Encoded, PageCost, Path, Workload as Modelled, Zone, highest_speed, predict,
};
use godwit_core::source::OnStall;
use serde::{Deserialize, Serialize};

use crate::workload::Workload;

/// What is left of a link for TCP's payload in Ethernet frames of 1500 bytes.
pub const PAYLOAD_SHARE: f64 = 0.95;

/// Of so many points …
const CYCLE: usize = 11;
/// … these converge by their own numbers, …
const CONVERGING: usize = 6;
/// … these are drawn without a condition, wherever they fall, and the others do not converge.
const UNCONDITIONAL: usize = 1;
/// By so much faster or slower the guest might write, by its own numbers, before a draw changes sides.
const CLEARANCE: f64 = 0.2;
/// A move that takes longer than this is not drawn.
const LONGEST: Duration = Duration::from_secs(13);
/// Caps in Mbit/s for pages that do not compress and for pages that do: with both the link is the bottleneck, and not the processors that
/// guest, source and destination share here.
const BANDWIDTHS_MBIT: [RangeInclusive<u32>; 2] = [150..=450, 40..=120];
/// A range of which nothing fits after so many draws has none that does.
const MOST_DRAWS: usize = 100_000;

/// What a compressible page, and a page of which one word has changed, are taken to cost until they are measured.
const COMPRESSED_BYTES: f64 = 520.0;
const WORD_BYTES: f64 = 24.0;

/// The order in which a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// From front to back.
    Seq,
    /// Drawn at random.
    Random,
    /// Nine of ten writes to a tenth of the pages.
    HotCold,
}

/// What its pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filling {
    /// Nothing that compresses.
    Random,
    /// Something that does.
    Compressible,
}

/// What one write is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Write {
    /// One word of the page.
    Word,
    /// All of the page.
    Page,
}

/// A guest and the link that it is to be moved over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Point {
    /// Which one, from 0.
    pub number: usize,
    /// RAM.
    pub memory_mib: u64,
    /// Of that, filled at boot.
    pub fill_mib: u64,
    /// Rewritten: 1 to 50 % of RAM.
    pub working_set_mib: u64,
    /// Pages written per second, in bytes, over the cap: 0.3 to 2.
    pub rate_over_bandwidth: f64,
    /// In which order.
    pub order: Order,
    /// Into what.
    pub contents: Filling,
    /// How much at a time.
    pub write: Write,
    /// The cap.
    pub bandwidth_mbit: u32,
    /// What the link carries in frames; the pause has it.
    pub link_mbit: u32,
    /// The longest pause to aim for.
    pub downtime_limit_ms: u64,
    /// The time budget: three times what it takes to send the memory once.
    pub timeout_ms: u64,
    /// What the guest's contents derive from.
    pub guest_seed: u64,
}

/// So many points for a seed.
pub fn draw(seed: u64, count: usize) -> Vec<Point> {
    let mut random = Rng::with_seed(seed);
    (0..count).map(|number| draw_one(number, &mut random)).collect()
}

fn draw_one(number: usize, random: &mut Rng) -> Point {
    // Spread over the run, so that a run that is cut short has both.
    let wanted = match number * 7 % CYCLE {
        place if place < CONVERGING => Some(true),
        place if place < CONVERGING + UNCONDITIONAL => None,
        _ => Some(false),
    };
    let mut point = Point::draw(number, random);
    for _ in 0..MOST_DRAWS {
        let Side { converges, clear, total } = point.side();
        let fits = wanted.is_none_or(|wanted| clear && converges == wanted);
        if fits && total <= LONGEST {
            break;
        }
        point = Point::draw(number, random);
    }
    point
}

/// Where a point stands by its own numbers.
struct Side {
    converges: bool,
    clear: bool,
    total: Duration,
}

impl Point {
    fn draw(number: usize, random: &mut Rng) -> Self {
        let contents = *pick(random, &[Filling::Random, Filling::Compressible]);
        let memory_mib = random.u64(128..=320);
        let working_set_mib = ((memory_mib as f64 * between(random, 0.01, 0.5)) as u64).max(2);
        let fill_mib = (memory_mib as f64 * between(random, 0.5, 0.9)) as u64;
        let bandwidth_mbit = random.u32(BANDWIDTHS_MBIT[contents as usize].clone());
        let once_ms = fill_mib.max(working_set_mib) as f64 * 8.0 * 1048.576 / f64::from(bandwidth_mbit);
        Self {
            number,
            memory_mib,
            fill_mib,
            working_set_mib,
            rate_over_bandwidth: between(random, 0.3, 2.0),
            order: *pick(random, &[Order::Seq, Order::Random, Order::HotCold]),
            contents,
            write: *pick(random, &[Write::Word, Write::Page]),
            bandwidth_mbit,
            link_mbit: (f64::from(bandwidth_mbit) * between(random, 1.15, 1.6)) as u32,
            downtime_limit_ms: random.u64(50..=300),
            timeout_ms: (3.0 * once_ms) as u64,
            guest_seed: random.u64(..),
        }
    }

    /// The cap in bytes per second.
    pub fn bandwidth_bytes_per_s(&self) -> f64 {
        f64::from(self.bandwidth_mbit) * 1e6 / 8.0
    }

    /// What the link carries of TCP's payload.
    pub fn switchover_mbit(&self) -> u32 {
        (f64::from(self.link_mbit) * PAYLOAD_SHARE) as u32
    }

    /// Pages that the guest is to write per second.
    pub fn pages_per_s(&self) -> u64 {
        (self.rate_over_bandwidth * self.bandwidth_bytes_per_s() / PAGE_SIZE as f64) as u64
    }

    /// The guest as options of the sender.
    pub fn workload(&self) -> Workload {
        let leaked = |text: String| -> &'static str { text.leak() };
        let mib = |mib: u64| leaked(format!("{mib}M"));
        Workload {
            memory: mib(self.memory_mib),
            vcpus: 1,
            fill: mib(self.fill_mib),
            working_set: mib(self.working_set_mib),
            rate: leaked(self.pages_per_s().to_string()),
            order: match self.order {
                Order::Seq => "seq",
                Order::Random => "random",
                Order::HotCold => "hot-cold",
            },
            write: match self.write {
                Write::Word => "word",
                Write::Page => "page",
            },
            contents: match self.contents {
                Filling::Random => "random",
                Filling::Compressible => "compressible",
            },
            seed: self.guest_seed,
        }
    }

    /// Options that `estimate` and `migrate` share.
    pub fn limits(&self) -> Vec<String> {
        let pairs = [
            ("--downtime-limit", format!("{}ms", self.downtime_limit_ms)),
            ("--timeout", format!("{}ms", self.timeout_ms)),
        ];
        pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    /// In one line.
    pub fn line(&self) -> String {
        let Workload { write, contents, order, .. } = self.workload();
        format!(
            "{:>3}/{:>3} MiB of {:>3}, {:>5} pages/s ({:.2} of {:>4} Mbit/s), {order:<8} {write:<4} {contents:<12} limit {:>3} ms",
            self.working_set_mib,
            self.fill_mib,
            self.memory_mib,
            self.pages_per_s(),
            self.rate_over_bandwidth,
            self.bandwidth_mbit,
            self.downtime_limit_ms,
        )
    }

    fn side(&self) -> Side {
        let (workload, path) = self.modelled();
        let limits = Limits {
            downtime: Duration::from_millis(self.downtime_limit_ms),
            max_rounds: 30,
            timeout: Some(Duration::from_millis(self.timeout_ms)),
            on_stall: OnStall::Abort,
        };
        let prediction = predict(&workload, &path, &limits);
        let clear = highest_speed(&workload, &path, &limits).is_none_or(|speed| (speed - 1.0).abs() > CLEARANCE);
        Side { converges: prediction.converges(), clear, total: prediction.total }
    }

    /// The guest by its own numbers.
    fn modelled(&self) -> (Modelled, Path) {
        let pages = |mib: u64| (mib << 8) as f64;
        let (set, rate) = (pages(self.working_set_mib), self.pages_per_s() as f64);
        let zone = |dirtying: Dirtying, pages: f64| Zone { touched_pages: pages, dirtying };
        let mut zones = match self.order {
            Order::Seq => vec![zone(Dirtying::sequential(rate, set), set)],
            Order::Random => vec![zone(Dirtying::random(rate, set), set)],
            Order::HotCold => vec![
                zone(Dirtying::random(0.9 * rate, 0.1 * set), 0.1 * set),
                zone(Dirtying::random(0.1 * rate, 0.9 * set), 0.9 * set),
            ],
        };
        zones.push(zone(Dirtying::none(), (pages(self.fill_mib) - set).max(0.0)));
        let cost = |wire_bytes| Encoded::always(PageCost { wire_bytes, ..PageCost::RAW });
        let first = match self.contents {
            Filling::Random => PageCost::RAW.wire_bytes,
            Filling::Compressible => COMPRESSED_BYTES,
        };
        let again = match self.write {
            Write::Word => WORD_BYTES,
            Write::Page => first,
        };
        let path = Path {
            bandwidth_bytes_per_s: self.bandwidth_bytes_per_s(),
            switchover_bytes_per_s: f64::from(self.switchover_mbit()) * 1e6 / 8.0,
            setup: Duration::from_millis(100),
            probe_bytes: 0.0,
            round_overhead: Duration::from_millis(1),
            fixed: Duration::from_millis(5),
            queued_bytes: 0.0,
        };
        let contents = Contents { first: cost(first), again: cost(again), in_pause: cost(again) };
        (Modelled { zones, contents }, path)
    }
}

fn between(random: &mut Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * random.f64()
}

fn pick<'a, T>(random: &mut Rng, from: &'a [T]) -> &'a T {
    &from[random.usize(..from.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_points_again_and_another_seed_others() {
        let lines = |seed| draw(seed, 5).iter().map(Point::line).collect::<Vec<_>>();
        assert_eq!(lines(7), lines(7));
        assert_ne!(lines(7), lines(8));
    }

    #[test]
    fn points_lie_in_their_ranges_and_on_both_sides() {
        for seed in 0..5 {
            let points = draw(seed, 44);
            for point in &points {
                let set = point.working_set_mib as f64 / point.memory_mib as f64;
                assert!((0.005..=0.5).contains(&set) && (0.3..=2.0).contains(&point.rate_over_bandwidth), "{point:?}");
                assert!(
                    point.fill_mib.max(point.working_set_mib) + 8 <= point.memory_mib,
                    "room for the guest: {point:?}"
                );
                assert!(point.link_mbit > point.bandwidth_mbit);
            }
            let hopeless = points.iter().filter(|point| !point.side().converges).count();
            assert!((14..=24).contains(&hopeless), "seed {seed}: {hopeless} of 44 do not converge");
            for order in [Order::Seq, Order::Random, Order::HotCold] {
                assert!(points.iter().any(|point| point.order == order), "seed {seed}: {order:?}");
            }
        }
    }
}
