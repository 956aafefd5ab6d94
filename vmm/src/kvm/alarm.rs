//! A timer that kicks the thread that made it: a vCPU leaves KVM_RUN at a time that it has chosen itself, whatever else the host's CPUs have to do.

use std::io;
use std::mem;
use std::ptr;
use std::time::Duration;

use vmm_sys_util::signal::SIGRTMIN;

/// Kicks one thread, the one that made it, once each time that it is set. Where the kick is received: [`super::receive_kicks`].
pub(crate) struct Alarm {
    timer: libc::timer_t,
}

impl Alarm {
    /// An alarm of this thread, not set.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        // SAFETY: all zeros are a valid value of this structure of numbers and pointers that the kernel does not follow.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        // SAFETY: gettid takes nothing and cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = ptr::null_mut();
        // SAFETY: the kernel reads `event` and writes `timer`, both of which outlive the call.
        let result = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer })
    }

    /// Kicks after this time. What was set before does not count any more. No time at all sets nothing.
    pub(crate) fn set(&self, after: Duration) {
        let no_interval = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // Both are far below what the fields hold.
        let value = libc::timespec { tv_sec: after.as_secs() as i64, tv_nsec: i64::from(after.subsec_nanos()) };
        let setting = libc::itimerspec { it_interval: no_interval, it_value: value };
        // SAFETY: the timer exists for as long as `self`, and the kernel reads `setting` only.
        let result = unsafe { libc::timer_settime(self.timer, 0, &setting, ptr::null_mut()) };
        debug_assert_eq!(result, 0, "the setting is valid");
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `of_this_thread`, and nobody uses it any more.
        unsafe { libc::timer_delete(self.timer) };
    }
}
