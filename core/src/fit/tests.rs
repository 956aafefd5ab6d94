//! The fit against writers and senders that are played page by page, and the policy with it.

use super::played::{COST, Order, PAGE, Play, Played, SENT_PER_S, path};
use super::*;
use crate::policy::{Decision, Limits, RoundEnd, Stall};
use crate::source::OnStall;

const MAX_ROUNDS: u32 = 30;

fn end(played: &Played, round: u32) -> RoundEnd {
    RoundEnd {
        round,
        elapsed: Duration::from_secs_f64(played.now),
        dirty_pages: played.dirty_pages(),
        wire_bytes_per_page: PAGE,
        queued_bytes: 0,
        applying: Duration::ZERO,
        switchover_bytes_per_s: SENT_PER_S * PAGE,
        fixed: Duration::ZERO,
        next: None,
        met: None,
    }
}

/// At its full speed, at the end of a round.
fn ahead(end: &RoundEnd, limits: &Limits) -> Ahead {
    let (round, elapsed) = (end.round, end.elapsed);
    Ahead { round, elapsed, share: 1.0, first: COST, again: COST, path: path(), limits: *limits }
}

fn limits(pages: f64) -> Limits {
    let downtime = Duration::from_secs_f64(pages / SENT_PER_S);
    Limits { downtime, max_rounds: MAX_ROUNDS, timeout: None, on_stall: OnStall::Abort }
}

/// What becomes of a move, and when it was said to have stalled.
#[derive(Debug)]
struct Story {
    /// The round at the end of which the limit was met.
    met: Option<u32>,
    /// The first round at the end of which the fit predicted that it would not be, and when that was.
    predicted: Option<Duration>,
    stalled: Option<(u32, Duration)>,
    /// After each round.
    dirty: Vec<u64>,
}

fn tell(play: Play, limit_pages: f64, seed: u64) -> Story {
    let (mut played, mut fit, mut stall) = (Played::new(play, seed), Fit::default(), Stall::default());
    let limits = limits(limit_pages);
    let mut story = Story { met: None, predicted: None, stalled: None, dirty: Vec::new() };
    fit.first_pass(played.first_pass());
    for round in 0..=MAX_ROUNDS {
        if round > 0 {
            fit.round(played.round(round));
        }
        let end = end(&played, round);
        story.dirty.push(end.dirty_pages);
        if end.decide(&limits) == Decision::Stop {
            story.met = Some(round);
            break;
        }
        if round < MAX_ROUNDS && story.stalled.is_none() {
            let outlook = fit.outlook(&ahead(&end, &limits)).unwrap();
            story.predicted =
                story.predicted.filter(|_| !outlook.converges).or((!outlook.converges).then_some(end.elapsed));
            story.stalled = stall.judge_round(end.elapsed, end.dirty_pages, &outlook).map(|_| (round, end.elapsed));
        }
    }
    story
}

/// Moves that are said to have stalled and would have converged, and moves that do not converge and are not said to have stalled, over
/// many guests. Those within a tenth of the border count neither way.
#[test]
fn stalls_are_told_from_moves_that_converge() {
    let mut random = fastrand::Rng::with_seed(7);
    let (mut converging, mut stalling, mut false_alarms, mut missed, mut late) =
        (0, 0, Vec::new(), Vec::new(), Vec::new());
    for seed in 0..250 {
        let memory = random.usize(8_000..20_000);
        let play = Play::any(&mut random, memory);
        let limit_pages = play.set as f64 * (0.02 + 0.5 * random.f64());
        let story = tell(play, limit_pages, seed);
        let least = story.dirty.iter().copied().min().unwrap_or(0) as f64;
        let border = (least / limit_pages - 1.0).abs() < 0.1;
        match (story.met, story.stalled) {
            _ if border && story.met.is_none() => continue,
            (Some(_), _) if play.is_luck() => continue,
            (Some(_), stalled) => {
                converging += 1;
                false_alarms.extend(stalled.map(|stalled| (play, limit_pages, stalled, story.dirty)));
            }
            (None, stalled) => {
                stalling += 1;
                match (stalled, story.predicted) {
                    (None, _) => missed.push((play, limit_pages)),
                    (Some((_, at)), Some(predicted)) if at > predicted + Duration::from_secs(10) => {
                        late.push((play, at, predicted))
                    }
                    _ => {}
                }
            }
        }
    }
    println!(
        "{converging} converge, {} of them were given up; {stalling} stall, {} of them unnoticed",
        false_alarms.len(),
        missed.len()
    );
    assert!(converging > 70 && stalling > 70, "{converging} {stalling}");
    assert!(false_alarms.len() * 50 <= converging, "of {converging}: {false_alarms:?}");
    assert!(missed.len() * 50 <= stalling, "of {stalling}: {missed:?}");
    assert!(late.is_empty(), "{late:?}");
}

const STEADY: Play =
    Play { order: Order::Random, memory: 12_000, set: 6_000, first: 2_000, k: 0.5, busy: 1.0, change: (0, 1.0) };

fn after(play: Play, rounds: u32) -> (Played, Fit) {
    let (mut played, mut fit) = (Played::new(play, 3), Fit::default());
    fit.first_pass(played.first_pass());
    for round in 1..=rounds {
        fit.round(played.round(round));
    }
    (played, fit)
}

#[test]
fn a_steady_guest_keeps_its_speed_and_a_change_is_seen() {
    let (_, fit) = after(STEADY, 2);
    assert!((0.8..1.25).contains(&fit.speed()), "{}", fit.speed());
    for factor in [0.4, 1.6] {
        let (_, fit) = after(Play { change: (1, factor), ..STEADY }, 2);
        assert!((0.75..1.35).contains(&(fit.speed() / factor)), "{factor}: {}", fit.speed());
    }
}

#[test]
fn a_guest_that_begins_to_write_only_later_is_known_from_its_last_round() {
    let (mut played, mut fit) = after(Play { k: 0.0, ..STEADY }, 0);
    assert_eq!(played.dirty_pages(), 0);
    played.play.k = 2.0;
    played.dirty[2_000..5_000].fill(true);
    fit.round(played.round(1));
    fit.round(played.round(2));
    let outlook = fit.outlook(&ahead(&end(&played, 2), &limits(500.0))).unwrap();
    assert!(!outlook.converges, "{outlook:?}");
}

#[test]
fn held_to_the_share_the_move_converges_in_time() {
    let (mut played, mut fit) = after(Play { k: 3.0, ..STEADY }, 1);
    let end_of = |played: &Played, round| end(played, round);
    let first = end_of(&played, 1);
    let limits = Limits { timeout: Some(first.elapsed + Duration::from_secs(1)), ..limits(600.0) };
    played.share = fit.throttled_share(&ahead(&first, &limits)).unwrap();
    assert!((0.1..0.5).contains(&played.share), "{}", played.share);
    let met = (2..30).find(|round| {
        fit.round(played.round(*round));
        end_of(&played, *round).decide(&limits) == Decision::Stop
    });
    assert!(met.is_some() && end_of(&played, 0).elapsed <= limits.timeout.unwrap(), "{met:?}");
    assert!((0.8..1.25).contains(&fit.speed()), "in its own time it writes as it did: {}", fit.speed());
}

#[test]
fn what_was_not_seen_gives_no_outlook() {
    let mut fit = Fit::default();
    let outlook = |fit: &Fit| fit.outlook(&ahead(&end(&Played::new(STEADY, 1), 0), &limits(1.0)));
    assert_eq!(outlook(&fit), None);
    fit.round(Seen { ran: Duration::from_secs(1), ..Seen::default() });
    assert_eq!(outlook(&fit), None);
    let (_, mut seen) = after(STEADY, 1);
    assert!(outlook(&seen).is_some());
    seen.interrupted();
    assert_eq!(outlook(&seen), None);
}

#[test]
fn in_the_first_pass_a_busy_writer_is_quicker_than_it_will_be() {
    let fit = |pages_per_s: f64| {
        let zones = vec![Zone { touched_pages: 60_000.0, dirtying: Dirtying::random(pages_per_s, 60_000.0) }];
        let mut fit = Fit::default();
        fit.first_pass(Seen { zones: Some(zones), dirty_pages: vec![40_000.0], ..Seen::default() });
        fit
    };
    assert!((0.4..0.5).contains(&fit(450_000.0).speed_where_clean()), "{}", fit(450_000.0).speed_where_clean());
    assert_eq!(fit(20_000.0).speed_where_clean(), 1.0, "it has other things to do");
    let mut told = fit(450_000.0);
    told.round(Seen { dirty_pages: vec![30_000.0], ran: Duration::from_millis(100), ..Seen::default() });
    assert_eq!(told.speed_where_clean(), 1.0, "a round has told");
}
