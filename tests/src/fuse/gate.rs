//! Makes, holds and refuses calls as the mode says.

use std::fs;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::mode::{Call, Mode, Rule};

/// How often it is looked whether the caller of a held call has been killed.
const LOOK_PERIOD: Duration = Duration::from_millis(10);

/// The bit of SIGKILL in a mask of signals.
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// What every call passes.
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    rule: Rule,
    /// How many calls are held.
    held: usize,
}

/// The caller was killed while its call was held.
struct Killed;

impl Gate {
    /// One that lets all calls pass.
    pub fn new() -> Self {
        let state = Mutex::new(State { rule: Rule::NORMAL, held: 0 });
        Self { shared: Arc::new(Shared { state, changed: Condvar::new() }) }
    }

    /// Applies to every call from now on, those that are held included.
    pub fn set(&self, rule: Rule) {
        self.shared.state().rule = rule;
        self.shared.changed.notify_all();
    }

    /// How many calls are held.
    pub fn held(&self) -> usize {
        self.shared.state().held
    }

    /// Makes a call of thread `caller` and answers it, or not, as the mode says. Returns at once.
    pub fn pass<T>(
        &self,
        call: Call,
        caller: u32,
        make: impl FnOnce() -> Result<T, Errno> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        if self.shared.state().rule.mode_of(call) == Mode::Normal {
            return answer(make());
        }
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || answer(shared.wait(call, caller, make)));
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    /// Waits until the call may be answered.
    fn wait<T>(&self, call: Call, caller: u32, make: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let mode = match self.mode_other_than(Mode::Unreachable, call, caller) {
            Ok(mode) => mode,
            Err(Killed) => return Err(Errno::EINTR),
        };
        match mode {
            // It cannot be both: this is what the wait was for.
            Mode::Normal | Mode::Unreachable => make(),
            Mode::Slow(delay) => {
                thread::sleep(delay);
                make()
            }
            Mode::Refusing(errno) => Err(errno),
            Mode::Unsure(errno) => make().and(Err(errno)),
            Mode::Mute => {
                let made = make();
                match self.mode_other_than(Mode::Mute, call, caller) {
                    Ok(_) => made,
                    Err(Killed) => Err(Errno::EINTR),
                }
            }
        }
    }

    /// Holds the call for as long as its mode is `mode`, and gives the next.
    fn mode_other_than(&self, mode: Mode, call: Call, caller: u32) -> Result<Mode, Killed> {
        let mut state = self.state();
        state.held += 1;
        let found = loop {
            let now = state.rule.mode_of(call);
            if now != mode {
                break Ok(now);
            }
            if is_killed(caller) {
                break Err(Killed);
            }
            let waited = self.changed.wait_timeout(state, LOOK_PERIOD);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.held -= 1;
        found
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a thread is about to die. The kernel keeps it waiting until its call is answered.
fn is_killed(thread: u32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{thread}/status")) else { return true };
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & SIGKILL_BIT != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::fuse::mode::Calls;

    const SOON: Duration = Duration::from_secs(10);

    /// Starts a call of this process in `mode`: hears that it was made, and how it was answered.
    fn call(gate: &Gate, mode: Mode) -> (mpsc::Receiver<()>, mpsc::Receiver<Result<u8, Errno>>) {
        let ((tell_made, made), (tell_answer, answer)) = (mpsc::channel(), mpsc::channel());
        gate.set(Rule { calls: Calls::Links, mode });
        let make = move || {
            tell_made.send(()).unwrap();
            Ok(7)
        };
        gate.pass(Call::Link, std::process::id(), make, move |result| tell_answer.send(result).unwrap());
        (made, answer)
    }

    fn heal(gate: &Gate) {
        gate.set(Rule::NORMAL);
    }

    #[test]
    fn what_is_answered_and_what_was_done_are_two_things() {
        let gate = Gate::new();
        for (mode, is_made, answered) in [
            (Mode::Normal, true, Ok(7)),
            (Mode::Slow(Duration::from_millis(20)), true, Ok(7)),
            (Mode::Refusing(Errno::EROFS), false, Err(Errno::EROFS)),
            (Mode::Unsure(Errno::EIO), true, Err(Errno::EIO)),
        ] {
            let (made, answer) = call(&gate, mode);
            assert_eq!(answer.recv_timeout(SOON), Ok(answered), "{mode}");
            assert_eq!(made.try_recv().is_ok(), is_made, "{mode}");
        }
    }

    #[test]
    fn a_call_that_hangs_fares_as_the_next_mode_says() {
        let gate = Gate::new();
        let (made, answer) = call(&gate, Mode::Unreachable);
        assert!(answer.recv_timeout(Duration::from_millis(50)).is_err());
        assert!(made.try_recv().is_err(), "not made yet");
        assert_eq!(gate.held(), 1);
        heal(&gate);
        assert_eq!(answer.recv_timeout(SOON), Ok(Ok(7)));

        let (made, answer) = call(&gate, Mode::Unreachable);
        gate.set(Rule { calls: Calls::All, mode: Mode::Refusing(Errno::EIO) });
        assert_eq!(answer.recv_timeout(SOON), Ok(Err(Errno::EIO)));
        assert!(made.try_recv().is_err(), "never made");
    }

    #[test]
    fn a_mute_store_has_done_what_it_was_asked_for() {
        let gate = Gate::new();
        let (made, answer) = call(&gate, Mode::Mute);
        assert_eq!(made.recv_timeout(SOON), Ok(()));
        assert!(answer.recv_timeout(Duration::from_millis(50)).is_err());
        heal(&gate);
        assert_eq!(answer.recv_timeout(SOON), Ok(Ok(7)));
    }

    #[test]
    fn a_dead_caller_is_let_go_and_its_call_is_not_made() {
        let gate = Gate::new();
        gate.set(Rule { calls: Calls::All, mode: Mode::Unreachable });
        let (tell, answer) = mpsc::channel();
        // Above the kernel's largest process id.
        gate.pass(Call::Link, 4_194_305, || -> Result<u8, Errno> { panic!("made") }, move |r| tell.send(r).unwrap());
        assert_eq!(answer.recv_timeout(SOON), Ok(Err(Errno::EINTR)));
        assert_eq!(gate.held(), 0);
    }
}
