//! `x-godwit-estimate`: measures the running guest, and predicts how its move would go.
//!
//! It ends early, and the machine is as it was, when whoever asked for it is gone, or a move begins: there is one dirty log.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_core::SourceMachine;
use godwit_core::estimate::{self, EstimateError, Options, SHORTEST};
use godwit_core::policy::Limits;
use godwit_core::predict::{Forecast, table};
use godwit_core::source::OnStall;
use serde::Deserialize;
use serde_json::json;

use super::commands::failed;
use super::state::Shared;
use crate::parameters::Parameters;
use crate::qmp::message::arguments;
use crate::qmp::{Answer, Arguments, Caller, QmpError};

/// How long to measure unless told.
const TIME_MS: u64 = 10_000;
/// The longest.
const MOST_MS: u64 = 10 * 60_000;
/// How often it is looked whether the caller is still there.
const LOOK: Duration = Duration::from_millis(100);
/// Links that people have, bytes per second.
const BANDWIDTHS: [f64; 6] = [12.5e6, 125e6, 1.25e9, 3.125e9, 5e9, 12.5e9];
/// Pauses that people ask for.
const DOWNTIMES_MS: [u64; 4] = [30, 100, 300, 1000];

/// Whether an estimate runs.
#[derive(Default)]
pub(super) struct Estimating {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    running: bool,
    called_off: bool,
}

/// The estimate that runs, until this is dropped.
struct Running<'e>(&'e Estimating);

impl Estimating {
    /// `None`: there is one.
    fn begin(&self) -> Option<Running<'_>> {
        let mut state = self.state();
        if state.running {
            return None;
        }
        *state = State { running: true, called_off: false };
        Some(Running(self))
    }

    /// Ends the one that runs, if any, and waits for its end: the machine is as it was.
    pub(super) fn call_off(&self) {
        let mut state = self.state();
        state.called_off = true;
        self.changed.notify_all();
        while state.running {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running<'_> {
    /// Waits for so long. False if there is no point in going on.
    fn wait(&self, time: Duration, caller: &Caller) -> bool {
        let until = Instant::now() + time;
        let mut state = self.0.state();
        loop {
            if state.called_off || caller.is_gone() {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            state = match self.0.changed.wait_timeout(state, left.min(LOOK)) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state().running = false;
        self.0.changed.notify_all();
    }
}

/// Measures, and predicts with a move's parameters.
pub(super) fn estimate(shared: &Arc<Shared>, caller: &Caller, command: &str, given: Arguments) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Estimate {
        /// Bytes per second of the link or the cap.
        bandwidth: Option<u64>,
        /// How long to measure.
        #[serde(default = "default_time_ms")]
        time: u64,
        #[serde(default)]
        parameters: Parameters,
    }
    let Estimate { bandwidth, time, parameters } = arguments(command, given)?;
    if !(SHORTEST.as_millis() as u64..=MOST_MS).contains(&time) {
        return Err(QmpError::generic(format!("time: {} to {MOST_MS} ms, not {time}", SHORTEST.as_millis())));
    }
    let mut settings = shared.state().settings.clone();
    settings.apply(&parameters).map_err(failed)?;
    let engine = settings.source_options();

    let (machine, running, pause) = {
        let _operation = shared.operation();
        let machine = shared.machine_at_rest()?;
        let running = shared
            .estimating
            .begin()
            .ok_or_else(|| QmpError::generic("another estimate is being made: wait for it"))?;
        let pause = estimate::rehearse(&machine).map_err(failed)?;
        (machine, running, pause)
    };
    let options = Options {
        time: Duration::from_millis(time),
        compression: engine.compression,
        delta_cache_bytes: engine.delta_cache_bytes,
    };
    let was_running = machine.is_running();
    let tell = |running: bool| shared.hub.publish("GODWIT_ESTIMATE", json!({ "running": running }));
    tell(true);
    let measured =
        estimate::measure(&machine, pause, &options, &|time| running.wait(time, caller)).map_err(|error| match error {
            EstimateError::CalledOff => QmpError::generic("the estimate was called off: a move begins"),
            error => failed(error),
        });
    drop(running);
    tell(false);
    let measured = measured?;

    let limits = Limits {
        downtime: engine.downtime_limit,
        max_rounds: engine.max_rounds,
        timeout: engine.timeout,
        on_stall: OnStall::Abort,
    };
    let bandwidth = bandwidth.or(engine.max_bandwidth_bytes_per_s).map(|bytes_per_s| bytes_per_s as f64);
    let switchover = engine.switchover_bandwidth_bytes_per_s.map(|bytes_per_s| bytes_per_s as f64);
    let forecast = bandwidth.map(|bandwidth| {
        let path = measured.path(bandwidth, switchover.unwrap_or(bandwidth));
        Forecast::new(&measured.workload, measured.spread, &path, &limits)
    });
    let at = |bandwidth| measured.path(bandwidth, bandwidth);
    let dirty_bytes_per_s = measured.dirty_bytes_per_s();
    Ok(json!({
        "running": was_running,
        "bandwidth_bytes_per_s": bandwidth,
        "downtime_limit_ms": limits.downtime.as_secs_f64() * 1e3,
        "dirty_bytes_per_s": dirty_bytes_per_s,
        "highest_dirty_bytes_per_s": forecast.as_ref().and_then(|forecast| forecast.margin).map(|margin| margin * dirty_bytes_per_s),
        "forecast": forecast,
        "table": table(&measured.workload, &at, &limits, &BANDWIDTHS, &DOWNTIMES_MS.map(Duration::from_millis)),
        "measured": measured,
    }))
}

fn default_time_ms() -> u64 {
    TIME_MS
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn there_is_one_at_a_time_and_a_move_ends_it() {
        let estimating = Arc::new(Estimating::default());
        estimating.call_off();
        let running = estimating.begin().unwrap();
        assert!(estimating.begin().is_none());
        let (done, is_done) = mpsc::channel();
        let other = Arc::clone(&estimating);
        let caller = thread::spawn(move || {
            other.call_off();
            done.send(()).unwrap();
        });
        assert!(is_done.recv_timeout(Duration::from_millis(50)).is_err(), "waits for the end");
        drop(running);
        is_done.recv_timeout(Duration::from_secs(20)).unwrap();
        caller.join().unwrap();
        assert!(estimating.begin().is_some());
    }
}
