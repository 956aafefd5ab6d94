//! Moves of a guest that writes too fast, in virtual time: what is decided, when, and what is done about it.

use super::*;
use crate::fit::Seen;
use crate::predict::{Contents, Dirtying, Workload, Zone, dirty_after_round};
use crate::progress::RoundReport;
use crate::source::OnStall;

/// Pages that leave in a second, and the bytes of one.
const SENT_PER_S: f64 = 30_000.0;
const PAGE: f64 = 4104.0;
const MEMORY: f64 = 100_000.0;
const SET: f64 = 60_000.0;

/// A writer of random pages, and what was done to it.
struct Guest {
    writes_per_s: f64,
    dirty_pages: f64,
    /// Every share that it was left.
    shares: Vec<f64>,
}

struct Move {
    said: Vec<String>,
    rounds: Vec<RoundReport>,
    outcome: SourceOutcome,
    took: Duration,
    shares: Vec<f64>,
}

impl Guest {
    fn share(&self) -> f64 {
        self.shares.last().copied().unwrap_or(1.0)
    }

    fn writing(&self) -> Workload {
        let share = self.share();
        let zone = Zone { touched_pages: MEMORY, dirtying: Dirtying::random(self.writes_per_s * share, SET) };
        Workload { zones: vec![zone], contents: Contents::incompressible() }
    }

    fn round(&mut self, first: bool) -> RoundSent {
        let pages = if first { MEMORY } else { self.dirty_pages };
        let seconds = pages / SENT_PER_S;
        let writing = self.writing();
        self.dirty_pages = match first {
            // Each page was dirtied for the time since it had been sent: half of the pass on average.
            true => writing.dirty_pages(Duration::from_secs_f64(seconds / 2.0)),
            false => dirty_after_round(&writing, &[self.dirty_pages], seconds)[0],
        };
        RoundSent {
            duration: Duration::from_secs_f64(seconds),
            pages: pages as u64,
            wire_bytes: (pages * PAGE) as u64,
            dirty_pages: self.dirty_pages as u64,
            capped: true,
            seen: Seen {
                zones: first.then_some(writing.zones),
                dirty_pages: vec![self.dirty_pages],
                ran: Duration::from_secs_f64(seconds * self.share()),
                ..Seen::default()
            },
            ..RoundSent::default()
        }
    }
}

/// Moves a guest that writes so many pages a second.
fn moved(writes_per_s: f64, options: SourceOptions) -> Move {
    let options = SourceOptions {
        delta_cache_bytes: 0,
        switchover_bandwidth_bytes_per_s: Some((SENT_PER_S * PAGE) as u64),
        ..options
    };
    let mut control = control(options, true);
    let mut guest = Guest { writes_per_s, dirty_pages: 0.0, shares: Vec::new() };
    let (mut now, mut said) = (Duration::ZERO, Vec::new());
    for _ in 0..10_000 {
        let mut answers = Vec::new();
        while let Some(action) = control.poll_action() {
            match action {
                Action::Say(text) => said.push(text),
                Action::Throttle(hold) => guest.shares.push(hold.share),
                Action::StopGuest => {
                    guest.shares.push(1.0);
                    answers
                        .push((Duration::ZERO, Input::Done(Done::Stopped { sections: Vec::new(), steps: Vec::new() })));
                }
                Action::Round { first } => {
                    let sent = guest.round(first);
                    answers.push((sent.duration, Input::Done(Done::RoundSent(sent))));
                }
                Action::Finish(outcome) => {
                    let rounds = match &*outcome {
                        SourceOutcome::Moved(report) | SourceOutcome::Failed(_, report) => report.rounds.clone(),
                        other => panic!("{other:?}"),
                    };
                    return Move { said, rounds, outcome: *outcome, took: now, shares: guest.shares };
                }
                action => answers.extend(healthy(&action, 0).map(|answer| (Duration::from_micros(100), answer))),
            }
        }
        for (after, answer) in answers {
            let ends = now + after;
            while let Some(deadline) = control.deadline().filter(|deadline| (now..ends).contains(deadline)) {
                now = deadline + Duration::from_nanos(1);
                control.handle(now, Input::Tick);
            }
            now = ends;
            control.handle(now, answer);
        }
    }
    panic!("goes on for ever: {said:?}");
}

fn on_stall(on_stall: OnStall) -> SourceOptions {
    SourceOptions { on_stall, max_rounds: 1000, downtime_limit: Duration::from_millis(200), ..SourceOptions::default() }
}

#[test]
fn a_hopeless_move_is_given_up_after_the_first_round_that_bears_it_out() {
    let given_up = moved(4.0 * SENT_PER_S, on_stall(OnStall::Abort));
    let SourceOutcome::Failed(why, _) = &given_up.outcome else { panic!("{:?}", given_up.outcome) };
    assert!(why.contains("writes too fast"), "{why}");
    assert!(given_up.rounds.len() <= 3, "{}", given_up.rounds.len());
    assert!(given_up.shares.is_empty());
    let quiet = moved(0.5 * SENT_PER_S, on_stall(OnStall::Abort));
    assert!(matches!(quiet.outcome, SourceOutcome::Moved(_)), "{:?}", quiet.outcome);
}

#[test]
fn a_time_budget_that_cannot_be_met_is_not_used_up() {
    // It would converge in some ten seconds.
    let timeout = Some(Duration::from_millis(4_500));
    let given_up = moved(0.8 * SENT_PER_S, SourceOptions { timeout, ..on_stall(OnStall::Abort) });
    let SourceOutcome::Failed(why, _) = &given_up.outcome else { panic!("{:?}", given_up.outcome) };
    assert!(why.contains("time budget") && given_up.took < Duration::from_secs(5), "{:?}: {why}", given_up.took);
}

#[test]
fn without_detection_nothing_but_the_limits_themselves_ends_a_hopeless_move() {
    let timeout = Some(Duration::from_secs(20));
    let given_up =
        moved(4.0 * SENT_PER_S, SourceOptions { timeout, stall_detection: false, ..on_stall(OnStall::Abort) });
    let SourceOutcome::Failed(why, _) = &given_up.outcome else { panic!("{:?}", given_up.outcome) };
    assert!(why.contains("is used up") && given_up.took >= Duration::from_secs(20), "{:?}: {why}", given_up.took);
}

#[test]
fn a_forced_pause_is_said_and_is_about_the_shortest_within_reach() {
    let forced = moved(2.0 * SENT_PER_S, on_stall(OnStall::Force));
    assert!(matches!(forced.outcome, SourceOutcome::Moved(_)), "{:?}", forced.outcome);
    assert!(forced.said.iter().any(|text| text.contains("--on-stall force): predicted pause")), "{:?}", forced.said);
    // x* = 1 − 1/k = 0.5 of the set.
    let shortest = 0.5 * SET / SENT_PER_S;
    let pause = forced.rounds.last().unwrap().predicted_pause_ms / 1e3;
    assert!((0.98 * shortest..1.15 * shortest).contains(&pause), "{pause} s, {shortest} s");
    assert!(forced.rounds.len() < 20, "{}", forced.rounds.len());
}

#[test]
fn a_throttled_move_meets_both_limits_at_a_rate_that_is_not_lower_than_it_must_be() {
    let timeout = Duration::from_secs(10);
    for writes in [1.3, 2.0, 4.0] {
        let options = SourceOptions { timeout: Some(timeout), ..on_stall(OnStall::Throttle) };
        let throttled = moved(writes * SENT_PER_S, options);
        assert!(matches!(throttled.outcome, SourceOutcome::Moved(_)), "{writes}: {:?}", throttled.outcome);
        assert!(throttled.took <= timeout && throttled.rounds.last().unwrap().predicted_pause_ms <= 200.0);
        assert!(throttled.said.iter().any(|text| text.contains("throttling the guest")), "{:?}", throttled.said);
        // Settled at the limit of 0.2 s × 30,000 pages of 60,000: x* = 0.1, k = 1.11.
        let held = &throttled.shares[..throttled.shares.len() - 1];
        assert!(held.iter().all(|share| (0.7..1.2).contains(&(share * writes))), "{writes}: {held:?}");
        assert_eq!(throttled.shares.last(), Some(&1.0), "lifted before the guest stops");
    }
}

#[test]
fn what_no_throttle_can_help_is_given_up() {
    let options = SourceOptions { timeout: Some(Duration::from_millis(6500)), ..on_stall(OnStall::Throttle) };
    let given_up = moved(4.0 * SENT_PER_S, SourceOptions { downtime_limit: Duration::from_millis(10), ..options });
    let SourceOutcome::Failed(why, _) = &given_up.outcome else { panic!("{:?}", given_up.outcome) };
    assert!(why.contains("no throttle changes that"), "{why}");
}
