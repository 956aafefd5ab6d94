//! From *connect* to the first page: versions and clocks, preflight, the rehearsal, a first look at the link.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::ending::Ending;
use super::{Action, Done, SourceControl};
use crate::machine::Refusal;
use crate::message::{
    FEATURE_DELTA, FEATURE_RETURN, FEATURES, Hello, Message, PreflightRequest, PrepareRequest, SharedClaims, VERSION,
};
use crate::phase::Phase;
use crate::policy::DATA_PATH_BYTES_PER_S;

/// Clock samples: the one with the shortest round trip counts (as in NTP, RFC 5905 section 10).
const CLOCK_SAMPLES: u32 = 5;
/// The link is first probed with little, so that a slow one is not kept busy for long …
const FIRST_PROBE_BYTES: u64 = 1 << 20;
/// … and again with more, for about as long as this, if it took less: in a few milliseconds a thread that waits for a core looks like a
/// slow link.
const TELLING_PROBE: Duration = Duration::from_millis(50);
/// Within these limits. The second probe is not to be taken for the first.
const SECOND_PROBE_BYTES: RangeInclusive<u64> = 2 << 20..=4 << 20;

/// What looking at a link of this speed sends.
pub fn probe_bytes(bytes_per_s: f64) -> f64 {
    let first = FIRST_PROBE_BYTES as f64;
    first + second_probe_bytes(bytes_per_s).map_or(0.0, |bytes| bytes as f64)
}

/// What is sent after a first probe that showed this speed.
fn second_probe_bytes(bytes_per_s: f64) -> Option<u64> {
    let telling_bytes = (bytes_per_s * TELLING_PROBE.as_secs_f64()) as u64;
    (telling_bytes > FIRST_PROBE_BYTES)
        .then(|| telling_bytes.clamp(*SECOND_PROBE_BYTES.start(), *SECOND_PROBE_BYTES.end()))
}

impl SourceControl {
    /// Something has been done before the first page was sent.
    pub(super) fn set_up(&mut self, done: Done) {
        match (self.phase, done) {
            (Phase::Connect, Done::Connected) => {
                self.link_up = true;
                self.enter(Phase::Handshake);
                let (program, host) = (self.program.clone(), self.host.clone());
                self.act(Action::Send(Message::Hello(Hello { version: VERSION, features: FEATURES, program, host })));
            }
            (Phase::Preflight, Done::Described(machine, question)) => {
                (self.machine, self.question) = (Some(machine), question);
                self.offer_memory();
            }
            (Phase::Preflight, Done::NotOffered(why)) => self.not_offered(why),
            (Phase::Preflight, Done::Judged(refusals)) => match refusals.is_empty() {
                true if self.options.dry_run => self.end(Ending::WouldMove),
                true => {
                    self.enter(Phase::Prepare);
                    if self.returns {
                        self.act(Action::Send(Message::Keep(self.options.reconnect_timeout)));
                    }
                    self.act(Action::Rehearse);
                }
                false => self.end(Ending::Refused(refusals)),
            },
            (Phase::Prepare, Done::Rehearsed { sections, pause }) => {
                self.cost.pause = pause;
                self.act(Action::Send(Message::Prepare(PrepareRequest {
                    table_seed: self.table_seed,
                    verify: self.options.verify,
                    clock_offset_ns: self.clock.offset_ns,
                    rehearsal: sections,
                })));
            }
            // Without a cap the rounds themselves measure the link.
            (Phase::Prepare, Done::DataOpened { capped }) => match self.options.switchover_bandwidth_bytes_per_s {
                None if capped => self.act(Action::Probe(FIRST_PROBE_BYTES)),
                _ => self.act(Action::StartLog),
            },
            (Phase::Prepare, Done::Probed { bytes, duration }) => {
                let rate = bytes as f64 / duration.as_secs_f64().max(1e-6);
                if bytes == FIRST_PROBE_BYTES
                    && let Some(bytes) = second_probe_bytes(rate)
                {
                    return self.act(Action::Probe(bytes));
                }
                self.switchover_bytes_per_s = rate.min(DATA_PATH_BYTES_PER_S);
                self.act(Action::Say(format!("the link takes {:.0} MB/s", rate / 1e6)));
                self.act(Action::StartLog);
            }
            (Phase::Prepare, Done::Flushed) => self.flushed(),
            (Phase::Prepare, Done::LogStarted) => {
                self.enter(Phase::FirstPass);
                self.begin_round();
            }
            (phase, done) => tracing::debug!("late in phase {phase}: {done:?}"),
        }
    }

    /// Asks the destination whether it can take the machine in.
    pub(super) fn ask_for_verdict(&mut self) {
        let Some(machine) = self.machine.clone() else { return };
        self.ask_about_postcopy();
        let request = PreflightRequest {
            machine,
            question: std::mem::take(&mut self.question),
            claims: self.options.ownership.as_deref().map(|holding| SharedClaims {
                directory: holding.directory().display().to_string(),
                claim: holding.claim().to_string(),
            }),
            channels: if self.hands_over { 0 } else { self.options.channels },
            dry_run: self.options.dry_run,
        };
        self.act(Action::Send(Message::Preflight(request)));
    }

    pub(super) fn hello(&mut self, hello: Hello) {
        if hello.version.major != VERSION.major {
            let why = format!(
                "{} ({}) speaks protocol {}.{}, this end {}.{}: the same version of Godwit is needed on both ends",
                hello.host, hello.program, hello.version.major, hello.version.minor, VERSION.major, VERSION.minor
            );
            return self.end(Ending::Refused(vec![Refusal::new("protocol", why)]));
        }
        self.peer_host = hello.host;
        self.peer_features = hello.features;
        if hello.features & FEATURE_DELTA == 0 {
            self.options.delta_cache_bytes = 0;
        }
        self.returns = hello.features & FEATURE_RETURN != 0 && !self.options.reconnect_timeout.is_zero();
        if self.agree_on_postcopy() {
            self.ask_clock();
        }
    }

    pub(super) fn ask_clock(&mut self) {
        self.clock.asked += 1;
        self.clock.asked_at = self.now;
        self.act(Action::Send(Message::ClockRequest(self.clock.asked)));
    }

    /// Called by the driver as it sends a clock request: the time on this host's CLOCK_REALTIME.
    pub fn clock_asked(&mut self, now: Duration, realtime_ns: i64) {
        self.clock.asked_at = now;
        self.clock.asked_realtime_ns = realtime_ns;
    }

    pub(super) fn clock_reply(&mut self, realtime_ns: i64) {
        let round_trip = self.now.saturating_sub(self.clock.asked_at);
        if self.clock.best_round_trip.is_none_or(|best| round_trip < best) {
            self.clock.best_round_trip = Some(round_trip);
            let middle = self.clock.asked_realtime_ns.saturating_add(round_trip.as_nanos() as i64 / 2);
            self.clock.offset_ns = realtime_ns.saturating_sub(middle);
            self.cost.round_trip = round_trip;
        }
        if self.clock.asked < CLOCK_SAMPLES {
            return self.ask_clock();
        }
        self.enter(Phase::Preflight);
        self.act(Action::Describe);
    }
}
