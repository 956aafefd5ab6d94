//! Threads that take samples run before others, so that what they see is not late.

use nix::sys::prctl;

/// Has this thread wake up on time: exact timers, and a real-time priority where that is allowed (root). A sampler that
/// does not get them sees less exactly, which its figures' uncertainty tells.
pub fn wake_on_time() {
    let _ = prctl::set_timerslack(1);
    let lowest_realtime = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameter outlives the call, which changes the calling thread (0) only.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &lowest_realtime) };
}
