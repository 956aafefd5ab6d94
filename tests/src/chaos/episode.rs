//! One move with its faults, and what came of it.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use godwit_core::Phase;

use super::claims;
use super::events::{Events, Story};
use super::fault::{Stage, Struck};
use super::kind::Kind;
use super::person;
use super::plan::Plan;
use super::tally::{self, Crime, Outcome, Violation};
use super::world::{END_LIMIT, HOSTS, Member, WORKLOAD, World};
use crate::clock::monotonic_ns;
use crate::godwit::Ended;
use crate::process::Process;
use crate::wait;

/// `--handover-timeout`: so soon whoever is entitled has to run.
const HANDOVER_TIMEOUT: &str = "4s";
const HANDOVER_LIMIT: Duration = Duration::from_secs(4);

/// `--pause-timeout`: before *commit*, this is what ends the wait for a destination that is dead and cannot say so.
const PAUSE_TIMEOUT: &str = "3s";

/// `--reconnect-timeout`: longer than most cuts, and short of making a run long.
const RECONNECT_TIMEOUT: &str = "3s";

/// What seeing that may take on a busy machine.
const SEEING_LIMIT: Duration = Duration::from_secs(1);

/// How long a move may take once everything is healed. Nothing in it has a limit that is longer.
const MOVE_LIMIT: Duration = Duration::from_secs(60);

/// What a receiver that has lost its claim ends with.
const EXIT_LOST: i32 = 7;

/// How a move was left once everything was healed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// The guest runs where it was.
    AtSource,
    /// The guest runs where it was to go.
    AtDestination,
    /// It runs nowhere: who had it is dead.
    OwnerDead,
    /// It runs nowhere, though who has it lives.
    Standing,
}

/// Plays `plan`. An error is one of the harness, not of what it tests.
pub fn play(world: &mut World<'_>, plan: &Plan, interrupted: &AtomicBool) -> Result<tally::Result> {
    let uri = world.prepare(plan.transport)?.node.uri()?;
    let destination = world.peer.as_ref().context("no receiver")?;
    let times_listening = destination.node.times_listening();
    let events = Events::listen(world.owner.node.qmp()?);
    let mut command =
        world.owner.node.start_move(&uri, &options(plan).iter().map(String::as_str).collect::<Vec<_>>())?;
    let stage = Stage {
        source: &world.owner,
        destination,
        client: command.pid(),
        events: &events,
        hosts: &world.hosts,
        stores: &world.stores,
        interrupted,
    };
    let struck = strike_all(&stage, plan)?;
    for struck in &struck {
        match struck.fault.kind {
            Kind::KillSource => world.owner.killed = true,
            Kind::KillDestination => world.peer.iter_mut().for_each(|peer| peer.killed = true),
            _ => {}
        }
    }
    let healed_ns = struck.iter().map(|struck| struck.healed_ns).max().unwrap_or_else(monotonic_ns);

    let mut case = Case { world, struck, healed_ns, times_listening, violations: Vec::new() };
    case.await_end(&events)?;
    let story = events.story();
    drop(events);
    let left = case.settle(&story)?;
    case.judge(left, &story, &mut command)?;
    let Case { struck, violations, .. } = case;
    let result = tally::Result {
        outcome: outcome(left, &story),
        struck: in_handover(world, &struck, &story),
        said: said(&story),
        violations,
    };
    if result.violations.is_empty() {
        go_on(world, plan, left)?;
    } else {
        // What is wrong once would be wrong in every further move.
        person::start_over(world)?;
    }
    Ok(result)
}

fn options(plan: &Plan) -> Vec<String> {
    let pairs = [
        ("--handover-timeout", HANDOVER_TIMEOUT),
        ("--pause-timeout", PAUSE_TIMEOUT),
        ("--reconnect-timeout", RECONNECT_TIMEOUT),
        ("--max-bandwidth", plan.cap),
        ("--channels", plan.channels),
    ];
    let mut options: Vec<String> = pairs.iter().flat_map(|(name, value)| [*name, *value]).map(str::to_owned).collect();
    if let Some(hold) = plan.hold {
        options.extend(["--test-hold-at".to_owned(), hold.phase.to_string()]);
    }
    options
}

/// Every fault on a thread of its own. All that can be healed has been when this returns.
fn strike_all(stage: &Stage<'_>, plan: &Plan) -> Result<Vec<Struck>> {
    thread::scope(|scope| {
        if let Some(hold) = plan.hold {
            scope.spawn(move || stage.hold(hold));
        }
        let faults: Vec<_> = plan.faults.iter().map(|&fault| scope.spawn(move || stage.play(fault))).collect();
        let play = faults.into_iter().map(|fault| fault.join().map_err(|_| anyhow!("a fault's thread panicked"))?);
        play.filter_map(Result::transpose).collect()
    })
}

/// Each fault's kind, and whether it struck after the source had begun to pause the guest and before anybody ran it again.
fn in_handover(world: &World<'_>, struck: &[Struck], story: &Story) -> Vec<(Kind, bool)> {
    let begin_ns = story.entered_ns(Phase::Pause);
    let told_ns = story.outcome.as_ref().map(|(_, at_ns)| *at_ns);
    let runs_ns = world.peer.as_ref().and_then(|peer| world.watch.proven_ns(peer.id));
    let end_ns = told_ns.into_iter().chain(runs_ns).min().unwrap_or(u64::MAX);
    let within = |at_ns: u64| begin_ns.is_some_and(|begin_ns| begin_ns <= at_ns && at_ns < end_ns);
    struck.iter().map(|struck| (struck.fault.kind, within(struck.at_ns))).collect()
}

/// What the source said of the end, with its reasons.
fn said(story: &Story) -> String {
    match (story.outcome(), story.reasons()) {
        (None, _) => "nothing".into(),
        (Some(outcome), reasons) if reasons.is_empty() => outcome.into(),
        (Some(outcome), reasons) => format!("{outcome}: {reasons}"),
    }
}

fn outcome(left: Left, story: &Story) -> Outcome {
    match left {
        Left::OwnerDead => Outcome::OwnerKilled,
        Left::Standing => Outcome::Person,
        _ if story.outcome() == Some("unknown") => Outcome::Person,
        Left::AtSource => Outcome::Stayed,
        Left::AtDestination => Outcome::Moved,
    }
}

/// A move that has been played.
struct Case<'a, 'b> {
    world: &'a mut World<'b>,
    struck: Vec<Struck>,
    healed_ns: u64,
    times_listening: usize,
    violations: Vec<Violation>,
}

impl Case<'_, '_> {
    /// Waits for the end of the move, and sees whether the guest stands for too long meanwhile.
    fn await_end(&mut self, events: &Events) -> Result<()> {
        let left_ns = self.deadline_ns().saturating_sub(monotonic_ns());
        if events.wait_for_end(Duration::from_nanos(left_ns)) {
            return Ok(());
        }
        let ids = [Some(self.world.owner.id), self.world.peer.as_ref().map(|peer| peer.id)];
        let ran = ids.into_iter().flatten().any(|id| self.world.watch.runs_since(id, self.healed_ns));
        if !ran && !self.entitled_was_killed()? {
            let text = format!("nobody has run the guest for {HANDOVER_LIMIT:?} after everything was healed");
            self.accuse(Crime::NoneRunning, text);
        }
        if !events.wait_for_end(MOVE_LIMIT) {
            self.accuse(Crime::Contradiction, format!("the move has not ended {MOVE_LIMIT:?} after that"));
        }
        Ok(())
    }

    /// Whoever has the newest claim is dead.
    fn entitled_was_killed(&self) -> Result<bool> {
        let newest = claims::newest(&self.world.stores.claims())?;
        let owner_has_it = newest.host == HOSTS[self.world.owner.host];
        Ok(if owner_has_it {
            self.world.owner.killed
        } else {
            self.world.peer.as_ref().is_some_and(|peer| peer.killed)
        })
    }

    /// Until then somebody has to run the guest.
    fn deadline_ns(&self) -> u64 {
        self.healed_ns + (HANDOVER_LIMIT + SEEING_LIMIT).as_nanos() as u64
    }

    /// Waits until somebody runs the guest, or nobody can, or ought to but does not.
    fn settle(&mut self, story: &Story) -> Result<Left> {
        let begin_ns = monotonic_ns();
        // Whoever runs is seen to, also if the move itself has taken long.
        let deadline_ns = self.deadline_ns().max(begin_ns + SEEING_LIMIT.as_nanos() as u64);
        let left = wait::until("it is known who has the machine", 2 * MOVE_LIMIT, || {
            if self.world.watch.runs_since(self.world.owner.id, begin_ns) {
                return Ok(Some(Left::AtSource));
            }
            let peer = self.world.peer.as_mut().context("no receiver")?;
            if self.world.watch.runs_since(peer.id, begin_ns) {
                return Ok(Some(Left::AtDestination));
            }
            let late = monotonic_ns() > deadline_ns;
            let newest = claims::newest(&self.world.stores.claims())?;
            let peer_lives = peer.node.process.is_running()?;
            let peer_gave_up = !peer_lives || peer.node.times_listening() > self.times_listening;
            let owner_lives = self.world.owner.node.process.is_running()?;
            let (entitled_lives, other_gave_up) = match newest.host == HOSTS[self.world.owner.host] {
                true => (owner_lives, peer_gave_up),
                false => (peer_lives, !owner_lives || story.outcome() == Some("unknown")),
            };
            Ok(match entitled_lives {
                true => late.then_some(Left::Standing),
                false => (other_gave_up || late).then_some(Left::OwnerDead),
            })
        })?;
        Ok(left)
    }

    /// Compares what is seen with what is said, and with what has to be.
    fn judge(&mut self, left: Left, story: &Story, command: &mut Process) -> Result<()> {
        for overlap in self.world.watch.take_overlaps() {
            let text = format!(
                "{} ran the guest after {} had begun to, seen at {} ns",
                overlap.earlier, overlap.later, overlap.at_ns
            );
            self.accuse(Crime::TwoRunning, text);
        }
        let newest = claims::newest(&self.world.stores.claims())?;
        if left == Left::Standing {
            let text = format!(
                "{} has epoch {} and lives, and does not run the guest {HANDOVER_LIMIT:?} after everything was healed; the source said {}",
                newest.host,
                newest.epoch,
                story.outcome().unwrap_or("nothing")
            );
            self.accuse(Crime::NoneRunning, text);
        }
        if let Some(audit) = story.audit().filter(|audit| !audit.starts_with("ok")) {
            self.accuse(Crime::AuditFailed, audit.to_owned());
        }
        let said = self.what_was_said(left, story, command)?;
        said.into_iter().for_each(|text| self.accuse(Crime::Contradiction, text));
        let runner = match left {
            Left::AtSource => Some(&self.world.owner),
            Left::AtDestination => self.world.peer.as_ref(),
            Left::OwnerDead | Left::Standing => None,
        };
        let Some(runner) = runner else { return Ok(()) };
        let host = runner.host_name();
        let unharmed = runner.node.ensure_guest_unharmed(&WORKLOAD);
        if newest.host != host {
            self.accuse(
                Crime::Contradiction,
                format!("{host} runs the guest, and epoch {} is {}'s", newest.epoch, newest.host),
            );
        }
        if let Err(error) = unharmed {
            self.accuse(Crime::GuestCheckFailed, format!("{error:#}"));
        }
        Ok(())
    }

    /// What was said of the move's end that is not so.
    fn what_was_said(&mut self, left: Left, story: &Story, command: &mut Process) -> Result<Vec<String>> {
        let source_killed = self.world.owner.killed;
        let destination_killed = self.world.peer.as_ref().is_some_and(|peer| peer.killed);
        let mut wrong = Vec::new();
        let told = story.outcome();
        let right = match (told, left) {
            (Some("moved"), _) => left == Left::AtDestination || (left == Left::OwnerDead && destination_killed),
            (Some("failed" | "cancelled" | "refused"), _) => {
                left == Left::AtSource || (left == Left::OwnerDead && source_killed)
            }
            (Some("unknown"), _) | (_, Left::Standing) => true,
            (Some(_), _) => false,
            (None, _) => source_killed,
        };
        if !right {
            wrong.push(format!("the source said {}, and the guest was {left:?}", told.unwrap_or("nothing")));
        }
        if self.struck.is_empty() && told != Some("moved") {
            wrong.push(format!(
                "no fault had struck, and the source said {}: {}",
                told.unwrap_or("nothing"),
                story.reasons()
            ));
        }
        let code = Ended::wait(command, END_LIMIT).ok().map(|ended| ended.code);
        let meant = told.and_then(|told| {
            Some(match told {
                "moved" => 0,
                "refused" => 3,
                "failed" => 4,
                "cancelled" => 5,
                "unknown" => 6,
                _ => return None,
            })
        });
        // A source that dies before its client has heard the end leaves that unknown.
        let heard = code == meant || (code == Some(6) && source_killed);
        if !heard && !self.struck.iter().any(|struck| struck.fault.kind == Kind::KillClient) {
            wrong.push(format!("the source said {}, and the command ended with {code:?}", told.unwrap_or("nothing")));
        }
        if let Some(peer) = self.world.peer.as_mut().filter(|peer| !peer.killed)
            && !peer.node.process.is_running()?
        {
            let status = peer.node.process.wait(END_LIMIT)?;
            if status.code() != Some(EXIT_LOST) {
                wrong.push(format!("the receiver ended with {status}"));
            }
        }
        Ok(wrong)
    }

    fn accuse(&mut self, crime: Crime, text: String) {
        self.violations.push(Violation { crime, text });
    }
}

/// Makes the world ready for the next move.
fn go_on(world: &mut World<'_>, plan: &Plan, left: Left) -> Result<()> {
    match left {
        Left::AtSource => keep_or_dismiss(world)?,
        Left::AtDestination => world.moved(),
        Left::OwnerDead => person::succeed(world, plan)?,
        Left::Standing => person::start_over(world)?,
    }
    world.see_off(false)?;
    if plan.second_start {
        person::try_a_second_start(world)?;
    }
    Ok(())
}

/// A receiver that still listens takes the next try.
fn keep_or_dismiss(world: &mut World<'_>) -> Result<()> {
    const LISTENING_LIMIT: Duration = Duration::from_millis(500);
    let Some(peer) = &mut world.peer else { return Ok(()) };
    let waits = |peer: &mut Member| -> Result<bool> {
        Ok(!peer.node.process.is_running()?
            || peer.node.execute("query-migrate", serde_json::json!({}))?["status"] == "failed")
    };
    let idle = wait::until_true("the receiver is idle", LISTENING_LIMIT, || waits(peer));
    if idle.is_err() {
        world.dismiss_peer();
    }
    Ok(())
}
