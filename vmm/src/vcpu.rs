//! A vCPU and the thread that runs it.
//!
//! ```text
//!            Run                     exit that ends it: a notice, then idle
//!   idle ───────────► in KVM_RUN ──────────────────────────────────────────► idle
//!     ▲                   │
//!     └── Pause + kick ───┘   (after KVM_RUN has completed what was pending)
//! ```
//!
//! An idle thread waits for commands and lends its vCPU to closures: whatever is done to a vCPU is done on its own thread.

pub(crate) mod msr;
mod pace;
pub(crate) mod state;

use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kvm_ioctls::{VcpuExit, VcpuFd};

pub(crate) use self::pace::Held;
use self::pace::Pace;
use crate::devices::{Devices, Effect};
use crate::error::VmmError;
use crate::kvm::{FaultCounter, internal_error_text, kick, receive_kicks};
use crate::sync::lock;

/// How often a pending access is completed before the vCPU counts as stuck: a string access may take several exits.
const MAX_COMPLETIONS: u32 = 4096;

/// What a vCPU's thread is told.
enum Command {
    Run,
    Pause(Sender<()>),
    /// From now on run for this share of the time only, and take no more faults.
    Throttle(Held),
    With(Box<dyn FnOnce(&VcpuFd) + Send>),
    Exit,
}

/// Something that a vCPU did that concerns the whole machine. The vCPU has stopped by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The guest asked for a reboot.
    Reset,
    /// The guest is at its end (a triple fault, a shutdown).
    Shutdown(String),
    /// KVM or the VMM cannot go on.
    Fault(String),
}

/// Where notices go. Called on the vCPU's thread, before it answers anything else.
pub(crate) type Notify = Arc<dyn Fn(Notice) + Send + Sync>;

/// A vCPU, seen from the rest of the machine.
pub(crate) struct Vcpu {
    id: u32,
    thread_id: i32,
    faults: Option<Arc<FaultCounter>>,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `id`, which stays idle.
    pub(crate) fn spawn(id: u32, fd: VcpuFd, devices: Arc<Devices>, notify: Notify) -> Result<Self, VmmError> {
        let faults = FaultCounter::open(&fd).map(Arc::new);
        let counter = faults.clone();
        let (commands, receiver) = mpsc::channel();
        let (started, has_started) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                // SAFETY: gettid takes nothing and cannot fail.
                let thread_id = unsafe { libc::gettid() };
                // `spawn` waits for it.
                let _ = started.send(thread_id);
                let mut fd = fd;
                receive_kicks(&mut fd, |fd| {
                    Runner { id, fd, commands: receiver, devices, notify, running: false, faults: counter, pace: None }
                        .serve()
                });
            })
            .map_err(VmmError::os(format!("cannot start the thread of vCPU {id}")))?;
        let thread_id = has_started.recv().unwrap_or(0);
        Ok(Self { id, thread_id, faults, commands, thread: Mutex::new(Some(thread)) })
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The thread that runs it.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Page faults that it took so far; `None` where they are not counted, or do not tell who writes.
    pub(crate) fn faults(&self) -> Option<u64> {
        self.faults.as_ref()?.read()
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        self.send(Command::Run);
    }

    /// Asks it to leave KVM_RUN and to be idle; what is dropped or sent on `done` says that it is.
    pub(crate) fn pause(&self, done: Sender<()>) {
        self.send(Command::Pause(done));
        self.kick();
    }

    /// Holds it back from now on.
    pub(crate) fn throttle(&self, held: Held) {
        self.send(Command::Throttle(held));
        self.kick();
    }

    /// Runs `body` with the idle vCPU, on its own thread. The answer comes on the channel; none if the thread has ended.
    pub(crate) fn with<T: Send + 'static>(&self, body: impl FnOnce(&VcpuFd) -> T + Send + 'static) -> Receiver<T> {
        let (answer, receiver) = mpsc::channel();
        self.send(Command::With(Box::new(move |vcpu| {
            // Nobody may be waiting any more.
            let _ = answer.send(body(vcpu));
        })));
        receiver
    }

    /// Lets the thread end: it enters the guest no more.
    pub(crate) fn dismiss(&self) {
        self.send(Command::Exit);
        self.kick();
    }

    /// Whether the thread has ended.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.thread).as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the thread and waits for it.
    pub(crate) fn stop(&self) {
        self.dismiss();
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of vCPU {} panicked", self.id);
        }
    }

    fn send(&self, command: Command) {
        // The thread only ends when told to.
        let _ = self.commands.send(command);
    }

    fn kick(&self) {
        if let Some(thread) = &*lock(&self.thread) {
            kick(thread);
        }
    }
}

/// What happens next on a vCPU's thread.
enum Next {
    Continue,
    Exit,
}

/// The vCPU's thread.
struct Runner<'a> {
    id: u32,
    fd: &'a mut VcpuFd,
    commands: Receiver<Command>,
    devices: Arc<Devices>,
    notify: Notify,
    running: bool,
    faults: Option<Arc<FaultCounter>>,
    /// While it is throttled.
    pace: Option<Pace>,
}

impl Runner<'_> {
    fn serve(mut self) {
        self.rehearse();
        loop {
            let next = if self.running { self.run_once() } else { self.wait() };
            if let Next::Exit = next {
                return;
            }
        }
    }

    /// Enters KVM_RUN and leaves it before the guest runs. The first time, KVM starts a thread for the VM and notes whose vCPU this is,
    /// which takes up to a millisecond: not in the pause of a guest that arrives.
    fn rehearse(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn wait(&mut self) -> Next {
        match self.commands.recv() {
            Ok(command) => self.obey(command),
            Err(_) => Next::Exit,
        }
    }

    /// One KVM_RUN and what follows from it.
    fn run_once(&mut self) -> Next {
        let stop = match self.fd.run() {
            Ok(exit) => handle(exit, &self.devices),
            Err(error) => match error.errno() {
                libc::EINTR => return self.obey_all(),
                libc::EAGAIN => None,
                _ => Some(Stop::Fault(format!("KVM_RUN failed: {error}"))),
            },
        };
        match stop {
            None => {}
            Some(Stop::Reset) => {
                self.complete_pending();
                self.end(Notice::Reset);
            }
            Some(Stop::PowerOff) => self.end(Notice::Shutdown("the guest powered off".into())),
            Some(Stop::Shutdown(why)) => {
                let text = self.describe(&why);
                self.end(Notice::Shutdown(text));
            }
            Some(Stop::InternalError) => {
                let why = internal_error_text(self.fd);
                let text = self.describe(&why);
                self.end(Notice::Fault(text));
            }
            Some(Stop::Fault(why)) => {
                let text = self.describe(&why);
                self.end(Notice::Fault(text));
            }
        }
        Next::Continue
    }

    /// Obeys what has been asked for. KVM_RUN has returned EINTR: nothing is pending.
    fn obey_all(&mut self) -> Next {
        // Before the commands are looked at: a kick after this one must not be lost.
        self.fd.set_kvm_immediate_exit(0);
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if let Next::Exit = self.obey(command) {
                        return Next::Exit;
                    }
                }
                Err(TryRecvError::Empty) => return self.rest(),
                Err(TryRecvError::Disconnected) => return Next::Exit,
            }
        }
    }

    fn obey(&mut self, command: Command) -> Next {
        match command {
            Command::Run => {
                self.running = true;
                if let Some(pace) = &mut self.pace {
                    pace.goes_on();
                }
            }
            Command::Pause(done) => {
                self.running = false;
                // The one who asked may have given up.
                let _ = done.send(());
            }
            Command::Throttle(held) => self.throttle(held),
            Command::With(body) => body(self.fd),
            Command::Exit => return Next::Exit,
        }
        Next::Continue
    }

    fn throttle(&mut self, held: Held) {
        match &mut self.pace {
            _ if held.share >= 1.0 => self.pace = None,
            Some(pace) => pace.set(held),
            None => match Pace::new(held, self.faults.clone()) {
                Ok(pace) => self.pace = Some(pace),
                Err(error) => tracing::warn!("cannot throttle vCPU {}: {error}", self.id),
            },
        }
    }

    /// Rests if it is time to, but obeys at once what is asked for meanwhile.
    fn rest(&mut self) -> Next {
        if !self.running {
            return Next::Continue;
        }
        let Some(until) = self.pace.as_mut().and_then(Pace::rest) else { return Next::Continue };
        while self.running && self.pace.is_some() {
            match self.commands.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(command) => {
                    if let Next::Exit = self.obey(command) {
                        return Next::Exit;
                    }
                }
                Err(_) => break,
            }
        }
        if let Some(pace) = &mut self.pace {
            pace.goes_on();
        }
        Next::Continue
    }

    /// Completes the access that the last exit was about, without running the guest.
    fn complete_pending(&mut self) {
        for _ in 0..MAX_COMPLETIONS {
            self.fd.set_kvm_immediate_exit(1);
            match self.fd.run() {
                Ok(exit) => {
                    handle(exit, &self.devices);
                }
                Err(_) => break,
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    fn end(&mut self, notice: Notice) {
        self.running = false;
        (self.notify)(notice);
    }

    /// What went wrong, with the registers that a person would ask for.
    fn describe(&self, why: &str) -> String {
        let id = self.id;
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return format!("vCPU {id}: {why}");
        };
        format!(
            "vCPU {id}: {why}; rip {:#x} (cs {:#x}) rsp {:#x} rflags {:#x} rax {:#x} rcx {:#x} rdx {:#x} \
             cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            regs.rip,
            sregs.cs.selector,
            regs.rsp,
            regs.rflags,
            regs.rax,
            regs.rcx,
            regs.rdx,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
        )
    }
}

/// Why a vCPU cannot simply go on.
enum Stop {
    Reset,
    PowerOff,
    Shutdown(String),
    InternalError,
    Fault(String),
}

/// What a write to a device means for the vCPU.
fn stop_for(effect: Effect) -> Option<Stop> {
    match effect {
        Effect::None => None,
        Effect::Reset => Some(Stop::Reset),
        Effect::PowerOff => Some(Stop::PowerOff),
    }
}

/// Does what an exit asks for.
fn handle(exit: VcpuExit<'_>, devices: &Devices) -> Option<Stop> {
    match exit {
        VcpuExit::IoIn(port, data) => devices.ports().read(u64::from(port), data),
        VcpuExit::IoOut(port, data) => return stop_for(devices.ports().write(u64::from(port), data)),
        VcpuExit::MmioRead(address, data) => devices.mmio().read(address, data),
        VcpuExit::MmioWrite(address, data) => return stop_for(devices.mmio().write(address, data)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => return Some(Stop::Shutdown("the guest shut down (a triple fault)".into())),
        VcpuExit::Hlt => return Some(Stop::Fault("HLT left KVM although its LAPIC is in the kernel".into())),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => return Some(Stop::Reset),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            return Some(Stop::PowerOff);
        }
        VcpuExit::SystemEvent(kind, _) => {
            return Some(Stop::Shutdown(format!("the guest crashed (system event {kind})")));
        }
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(Stop::Fault(format!("the host's CPU {cpu} refused to enter the guest (reason {reason:#x})")));
        }
        VcpuExit::InternalError => return Some(Stop::InternalError),
        VcpuExit::MemoryFault { gpa, size, .. } => {
            return Some(Stop::Fault(format!("KVM cannot reach guest memory at {gpa:#x} ({size} bytes)")));
        }
        other => return Some(Stop::Fault(format!("an exit that this version does not handle: {other:?}"))),
    }
    None
}
