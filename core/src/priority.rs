//! Threads that a paused guest waits for do not wait for others, and what nobody waits for is done later.

use std::thread;
use std::time::Duration;

/// How far before others: enough to run at once when something comes in, however busy the host is.
const NICE: libc::c_int = -10;

/// A resumed guest's first moments, in which it touches its pages again.
const GRACE: Duration = Duration::from_millis(100);

/// A thread that steers a move, until this is dropped.
pub(crate) struct Prompt {
    before: libc::c_int,
}

/// Has the calling thread run as soon as there is something for it to do, where that is allowed (root): it steers a move, and is
/// idle most of the time. On a busy host each hand-over from thread to thread takes milliseconds otherwise. What the thread starts
/// (vCPUs, data channels) runs as it would without.
#[must_use]
pub(crate) fn run_promptly() -> Prompt {
    let before = nice();
    // Not for what it starts.
    if !set(libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, NICE) {
        tracing::debug!("the move's threads run as others do: {}", std::io::Error::last_os_error());
    }
    Prompt { before }
}

/// Has the calling thread run only while a core has nothing else to do.
pub(crate) fn run_when_idle() {
    // SAFETY: changes the calling thread (0) only, and the parameter outlives the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &libc::sched_param { sched_priority: 0 }) } != 0 {
        tracing::debug!("a thread does not wait for others: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        if nice() != self.before && !set(libc::SCHED_OTHER, self.before) {
            tracing::debug!("a thread stays prompt: {}", std::io::Error::last_os_error());
        }
    }
}

/// Drops `what` once the guest has had [`GRACE`], on a thread of its own. To free what a move has used (caches of pages, the table) takes
/// longer than the guest's pause, and while it does, whoever needs the process's memory map waits: a guest that has just been resumed in
/// it, or on the same host, has better use for the core and the map.
pub(crate) fn drop_later(what: impl Send + 'static) {
    let dropping = move || {
        thread::sleep(GRACE);
        drop(what);
    };
    if let Err(error) = thread::Builder::new().name("free".into()).spawn(dropping) {
        tracing::debug!("no thread to free memory on: {error}");
    }
}

fn nice() -> libc::c_int {
    // SAFETY: asks about the calling thread (0).
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

fn set(policy: libc::c_int, nice: libc::c_int) -> bool {
    let usual = libc::sched_param { sched_priority: 0 };
    // SAFETY: both change the calling thread (0) only, and the parameter outlives the call.
    unsafe { libc::sched_setscheduler(0, policy, &usual) == 0 && libc::setpriority(libc::PRIO_PROCESS, 0, nice) == 0 }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_is_dropped_later_is_dropped() {
        struct Tells(std::sync::mpsc::Sender<Instant>);
        impl Drop for Tells {
            fn drop(&mut self) {
                let _ = self.0.send(Instant::now());
            }
        }
        let (told, dropped) = std::sync::mpsc::channel();
        let begin = Instant::now();
        drop_later(Tells(told));
        assert!(dropped.recv().unwrap() >= begin + GRACE);
    }

    #[test]
    fn what_a_prompt_thread_starts_is_as_others_are_and_it_is_prompt_for_a_while_only() {
        let before = nice();
        let seen = std::thread::spawn(move || {
            let prompt = run_promptly();
            let (own, started) = (nice(), std::thread::spawn(nice).join().unwrap());
            drop(prompt);
            (own, started, nice())
        });
        let (own, started, after) = seen.join().unwrap();
        assert!(own == NICE || own == before, "{own}: done, or not allowed");
        assert!(started == before || started == 0, "{started}");
        assert_eq!((after, nice()), (before, before));
    }
}
