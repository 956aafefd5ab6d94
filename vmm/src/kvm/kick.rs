//! Making a vCPU's thread leave KVM_RUN, without a race.
//!
//! A kick is a signal whose handler sets `immediate_exit` in the `kvm_run` page of the thread that it hits. Whether it
//! arrives inside KVM_RUN, just before it or in the middle of an exit's emulation, the next KVM_RUN completes what is
//! pending and returns EINTR.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use libc::siginfo_t;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::error::VmmError;

thread_local! {
    /// `immediate_exit` of this thread's vCPU, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the signal handler, once for the process.
pub(crate) fn install_kick_handler() -> Result<(), VmmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed =
        INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| error.errno()));
    installed.map_err(|errno| {
        VmmError::os("cannot install the signal handler that stops vCPUs")(std::io::Error::from_raw_os_error(errno))
    })
}

/// Makes `thread` leave KVM_RUN. Does nothing to a thread that has ended.
pub(crate) fn kick(thread: &JoinHandle<()>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::debug!("kick of a vCPU: {error}");
    }
}

/// Runs `body` with this thread's kicks directed at `vcpu`.
pub(crate) fn receive_kicks<R>(vcpu: &mut VcpuFd, body: impl FnOnce(&mut VcpuFd) -> R) -> R {
    /// Turns kicks off however `body` ends.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            IMMEDIATE_EXIT.set(ptr::null_mut());
        }
    }
    let off = Off;
    IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
    let result = body(vcpu);
    drop(off);
    result
}

extern "C" fn on_kick(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    // A constant-initialised cell without destructor: safe to read in a signal handler.
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: `receive_kicks` set the pointer on this very thread, and clears it before the vCPU and with it the kvm_run
        // page can go away. The kernel shares the page too, so that the write is volatile.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
