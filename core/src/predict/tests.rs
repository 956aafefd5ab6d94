//! The predictor against closed forms, and against writers and senders that are played page by page.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::policy::Limits;
use crate::source::OnStall;

const MS: Duration = Duration::from_millis(1);
/// Bytes of a page with its share of headers.
const PAGE: f64 = 4104.0;

fn limits(downtime: Duration) -> Limits {
    Limits { downtime, max_rounds: 30, timeout: None, on_stall: OnStall::Abort }
}

fn path(pages_per_s: f64) -> Path {
    Path {
        bandwidth_bytes_per_s: pages_per_s * PAGE,
        switchover_bytes_per_s: pages_per_s * PAGE,
        setup: Duration::ZERO,
        probe_bytes: 0.0,
        round_overhead: Duration::ZERO,
        fixed: Duration::ZERO,
        queued_bytes: 0.0,
    }
}

fn one_zone(dirtying: Dirtying, touched_pages: f64) -> Workload {
    Workload { zones: vec![Zone { touched_pages, dirtying }], contents: Contents::incompressible() }
}

/// Rounds that never end before the 30th.
fn rounds(workload: &Workload, path: &Path) -> Vec<PredictedRound> {
    predict(workload, path, &limits(Duration::ZERO)).rounds
}

#[test]
fn what_stays_dirty_settles_at_one_less_one_over_k() {
    for (k, settled) in [(1.2, 0.17), (2.0, 0.50), (4.0, 0.75)] {
        let (set, sent_per_s) = (50_000.0, 30_000.0);
        let rounds = rounds(&one_zone(Dirtying::random(k * sent_per_s, set), set), &path(sent_per_s));
        let share = rounds.last().unwrap().dirty_pages / set;
        assert!((share - settled).abs() < 0.01, "k = {k}: {share}");
    }
    let slower = rounds(&one_zone(Dirtying::random(24_000.0, 50_000.0), 50_000.0), &path(30_000.0));
    assert!(slower.last().unwrap().dirty_pages < 0.01 * 50_000.0, "k = 0.8");
}

#[test]
fn an_idle_guest_takes_its_memory_once_and_the_fixed_pause() {
    let path = Path { setup: 50 * MS, fixed: 3 * MS, ..path(10_000.0) };
    let forecast = Forecast::new(&one_zone(Dirtying::none(), 20_000.0), 0.0, &path, &limits(10 * MS));
    assert!(forecast.converges && forecast.margin.is_none() && !forecast.border);
    assert_eq!((forecast.rounds.len(), forecast.pause_ms.likely), (1, 3.0));
    assert!((forecast.total_s.likely - 2.053).abs() < 1e-9);
    assert_eq!(forecast.wire_bytes.likely, 20_000.0 * PAGE);
}

#[test]
fn the_border_is_where_the_closed_form_has_it() {
    // Settled: x* W pages take x* W / rate in the pause. With a limit of 0.4 W / rate, x* = 0.4, so k = 1 / 0.6.
    let (set, rate) = (60_000.0, 30_000.0);
    let limit = limits(Duration::from_secs_f64(0.4 * set / rate));
    let slow = one_zone(Dirtying::random(rate, set), set);
    let speed = highest_speed(&slow, &path(rate), &limit).unwrap();
    assert!((speed - 1.0 / 0.6).abs() < 0.02, "{speed}");
    assert!(predict(&slow.at_speed(speed * 0.98), &path(rate), &limit).converges());
    let over = predict(&slow.at_speed(speed * 1.02), &path(rate), &limit);
    assert!(!over.converges() && over.rounds.len() == 31);
    let timed = Limits { timeout: Some(Duration::from_secs(5)), ..limit };
    let in_time = highest_speed(&slow, &path(rate), &timed).unwrap();
    assert!(in_time < speed, "{in_time}: a time budget leaves fewer rounds");
    let fixed = Path { fixed: 2 * MS, ..path(rate) };
    assert_eq!(highest_speed(&slow, &fixed, &limits(MS)), Some(0.0), "no speed makes the fixed part shorter");
}

#[test]
fn the_shortest_pause_is_within_reach_and_shorter_ones_are_not() {
    let workload = one_zone(Dirtying::random(60_000.0, 50_000.0), 50_000.0);
    let path = path(30_000.0);
    let shortest = shortest_pause(&workload, &path, 30);
    assert!(predict(&workload, &path, &limits(shortest.mul_f64(1.01))).converges());
    assert!(!predict(&workload, &path, &limits(shortest.mul_f64(0.99))).converges());
}

#[test]
fn a_table_has_a_forecast_for_every_pair() {
    let workload = one_zone(Dirtying::random(20_000.0, 50_000.0), 50_000.0);
    let rows =
        table(&workload, &|bandwidth| path(bandwidth / PAGE), &limits(MS), &[125e6, 1250e6], &[30 * MS, 300 * MS]);
    assert_eq!(rows.iter().map(|row| row.cells.len()).collect::<Vec<_>>(), [2, 2]);
    assert!(rows[1].cells[0].total_s < rows[0].cells[1].total_s);
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Random,
    Sequential,
    HotCold,
}

/// A writer and a sender, page by page, with bits that are cleared as the engine does it. Returns the pages found dirty at the end of
/// each round.
fn play(order: Order, set: usize, writes_per_page_sent: f64, rounds: usize) -> Vec<f64> {
    play_from(set / 3, order, set, writes_per_page_sent, rounds)
}

/// The same; a sequential writer begins at this page.
fn play_from(mut at: usize, order: Order, set: usize, writes_per_page_sent: f64, rounds: usize) -> Vec<f64> {
    let mut dirty = vec![false; set];
    let mut pending = vec![true; set];
    let (mut due, mut random) = (0.0, 0x9e37_79b9_7f4a_7c15u64);
    let mut draw = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let mut found = Vec::new();
    for _ in 0..rounds {
        for page in 0..set {
            if !std::mem::take(&mut pending[page]) {
                continue;
            }
            dirty[page] = false;
            due += writes_per_page_sent;
            while due >= 1.0 {
                due -= 1.0;
                let written = match order {
                    Order::Random => draw(set),
                    Order::HotCold if draw(10) > 0 => draw(set / 10),
                    Order::HotCold => set / 10 + draw(set - set / 10),
                    Order::Sequential => {
                        at = (at + 1) % set;
                        at
                    }
                };
                dirty[written] = true;
            }
        }
        pending.clone_from(&dirty);
        found.push(dirty.iter().filter(|dirty| **dirty).count() as f64);
    }
    found
}

/// The same writer as `estimate` would know it: hot and cold pages lie apart.
fn known(order: Order, set: f64, writes_per_s: f64) -> Workload {
    let zones = match order {
        Order::Random => vec![(Dirtying::random(writes_per_s, set), 1.0)],
        Order::Sequential => vec![(Dirtying::sequential(writes_per_s, set), 1.0)],
        Order::HotCold => vec![
            (Dirtying::random(0.9 * writes_per_s, 0.1 * set), 0.1),
            (Dirtying::random(0.1 * writes_per_s, 0.9 * set), 0.9),
        ],
    };
    let zone = |(dirtying, share): (Dirtying, f64)| Zone { touched_pages: set * share, dirtying };
    Workload { zones: zones.into_iter().map(zone).collect(), contents: Contents::incompressible() }
}

fn predicted(order: Order, set: usize, k: f64, rounds: usize) -> Vec<f64> {
    let sent_per_s = 10_000.0;
    let all = self::rounds(&known(order, set as f64, k * sent_per_s), &path(sent_per_s));
    all.iter().take(rounds).map(|round| round.dirty_pages).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rounds_of_a_random_writer_are_as_played(set in 5_000usize..20_000, k in 0.2f64..4.0) {
        let (played, predicted) = (play(Order::Random, set, k, 8), predicted(Order::Random, set, k, 8));
        for (played, predicted) in played.iter().zip(predicted) {
            prop_assert!((played - predicted).abs() < 0.03 * set as f64, "k = {k}: {played} {predicted} of {set}");
        }
    }

    #[test]
    fn rounds_of_a_hot_cold_writer_are_as_played(set in 5_000usize..20_000, k in 0.2f64..6.0) {
        let (played, predicted) = (play(Order::HotCold, set, k, 8), predicted(Order::HotCold, set, k, 8));
        for (played, predicted) in played.iter().zip(predicted) {
            prop_assert!((played - predicted).abs() < 0.04 * set as f64, "k = {k}: {played} {predicted} of {set}");
        }
    }

    /// Where a sequential writer is when the sender begins decides how much it writes behind it: predicted is the mean.
    #[test]
    fn rounds_of_a_sequential_writer_are_as_played_on_average(set in 5_000usize..20_000, k in 0.1f64..0.8) {
        let sent = |dirty: &[f64]| dirty.iter().sum::<f64>();
        let played = (0..16).map(|phase| sent(&play_from(set * phase / 16, Order::Sequential, set, k, 8))).sum::<f64>() / 16.0;
        let predicted = sent(&predicted(Order::Sequential, set, k, 8));
        prop_assert!((played - predicted).abs() < 0.1 * (played + set as f64), "k = {k}: {played} {predicted} of {set}");
    }

    #[test]
    fn any_numbers_end(
        rate in 0.0f64..1e9, set in 0.0f64..1e10, touched in 0.0f64..1e10, bandwidth in 0.0f64..1e12,
        downtime_ms in 0u64..10_000, timeout_s in proptest::option::of(0u64..1000),
    ) {
        let path = Path { switchover_bytes_per_s: bandwidth, bandwidth_bytes_per_s: bandwidth, ..path(1.0) };
        let limits = Limits { timeout: timeout_s.map(Duration::from_secs), ..limits(Duration::from_millis(downtime_ms)) };
        let prediction = predict(&one_zone(Dirtying::random(rate, set), touched), &path, &limits);
        prop_assert!(prediction.rounds.len() <= 31);
        prop_assert!(prediction.rounds.iter().all(|round| round.dirty_pages.is_finite() && round.seconds.is_finite()));
    }
}
