//! Takes one machine in, and turns every further peer away by name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_control::console::{out, say};
use godwit_control::keeper::KeeperHandle;
use godwit_core::destination::{DestinationOptions, DestinationOutcome, receive, refuse};
use godwit_core::progress::{Event, Observer};
use godwit_core::{Channel, HangUp};
use godwit_transport::{DataChannels, Listener, TransportError};
use godwit_vmm::{HostOptions, KvmHost, ReadyVm};
use serde_json::json;

/// How often it is looked whether the listener is still open.
const ACCEPT_POLL: Duration = Duration::from_secs(1);

/// For so long a peer is kept waiting while another one's move comes in, in case that has just failed.
const CLEAR_UP_LIMIT: Duration = Duration::from_millis(500);

const CLEAR_UP_POLL: Duration = Duration::from_millis(5);

/// What is needed to take a machine in.
pub(crate) struct Reception {
    pub(crate) listener: Listener,
    pub(crate) keeper: KeeperHandle,
    pub(crate) host: HostOptions,
    pub(crate) options: DestinationOptions,
    /// Stdout is for events.
    pub(crate) json: bool,
}

impl Reception {
    /// Says where it listens: when it begins to, and again whenever a machine did not come in.
    pub(crate) fn say_listening(&self) {
        let uri = self.listener.uri();
        self.keeper.publish("LISTENING", json!({ "uri": uri.to_string() }));
        if !self.json {
            out(format_args!("LISTENING {uri}"));
        }
    }

    /// Receives peers for as long as the process lives.
    pub(crate) fn run(self: Arc<Self>) -> Result<(), TransportError> {
        let mut vm = None;
        loop {
            if vm.is_none() && self.keeper.busy_with().is_none() {
                // Who connects need not wait for it. What is in the way is said when a machine arrives.
                vm = ReadyVm::new().ok();
            }
            let Some(control) = self.listener.next_control(ACCEPT_POLL)? else { continue };
            self.let_the_last_one_leave();
            if let Some(busy) = self.keeper.busy_with() {
                // On a thread of its own: a peer that is slow to hear it must not keep the next one waiting.
                let reception = Arc::clone(&self);
                let turn_away = move || reception.turn_away(control, &busy);
                if let Err(error) = thread::Builder::new().name("turn-away".into()).spawn(turn_away) {
                    tracing::warn!("a peer was turned away without a word: no thread could be started: {error}");
                }
                continue;
            }
            // From here on the keeper is busy, so the next peer is turned away.
            let options = DestinationOptions { stop: Arc::default(), abandon: Arc::default(), ..self.options.clone() };
            self.keeper.incoming_begins(
                &control.peer,
                Arc::new(CallOff(Arc::clone(&options.stop))),
                Arc::clone(&options.abandon),
            );
            let data = self.listener.incoming_data();
            let host = KvmHost::with_vm(self.host.clone(), vm.take());
            let reception = Arc::clone(&self);
            let take_in = move || reception.take_in(control, data, host, &options);
            let spawned = thread::Builder::new().name("receive".into()).spawn(take_in);
            if let Err(error) = spawned {
                self.keeper.incoming_failed(&format!("no thread could be started: {error}"));
            }
        }
    }

    /// A source that tries again at once must not be turned away because its first try is still being cleared up.
    fn let_the_last_one_leave(&self) {
        let deadline = Instant::now() + CLEAR_UP_LIMIT;
        while self.keeper.is_taking_in() && Instant::now() < deadline {
            thread::sleep(CLEAR_UP_POLL);
        }
    }

    fn turn_away(&self, control: Channel, busy: &str) {
        let name = &self.options.host_name;
        let reason = format!("the receiver {} on {name} takes no machine in: {busy}", self.listener.uri());
        say(format_args!("turned away {}: {busy}", control.peer));
        refuse(control, &reason);
    }

    fn take_in(&self, control: Channel, mut data: DataChannels, mut host: KvmHost, options: &DestinationOptions) {
        let peer = control.peer.clone();
        say(format_args!("{peer} connects"));
        let observer = Arc::new(IncomingObserver { keeper: self.keeper.clone(), is_here: AtomicBool::new(false) });
        match receive(control, &mut data, &mut host, options, Arc::clone(&observer) as _) {
            DestinationOutcome::Owned { machine, running, holding, filling, report } => {
                let machine = machine.into_machine();
                let name = machine.config().name.clone();
                if let Some(holding) = holding {
                    self.keeper.hold(holding);
                }
                if let Err(error) = self.keeper.adopt(machine, true) {
                    tracing::error!("the machine's own events cannot be heard: {error}");
                }
                let state = if running { "runs" } else { "is here, paused" };
                say(format_args!("the machine `{name}` from {peer} {state}"));
                self.keeper.publish("GODWIT_ARRIVED", json!({ "name": name, "running": running, "report": report }));
                if let Some(filling) = filling {
                    let missing = filling.missing_pages();
                    say(format_args!("{missing} pages of its memory are still to come (post-copy)"));
                    observer.is_here.store(true, Ordering::Release);
                    let filled = filling.run(&mut data);
                    say(format_args!(
                        "all of its memory is here: {} pages were waited for, 99 % of them for {} µs at most",
                        filled.faults, filled.fault_p99_us
                    ));
                    self.keeper.publish("GODWIT_FILLED", json!(filled));
                }
            }
            DestinationOutcome::Dropped(why) => self.keeper.lost(&why),
            DestinationOutcome::Ended(why) => {
                say(format_args!("{why}; listening again"));
                self.keeper.incoming_failed(&why);
                self.say_listening();
            }
        }
    }
}

/// Ends a move that comes in, whatever its links are at the moment.
struct CallOff(Arc<AtomicBool>);

impl HangUp for CallOff {
    fn hang_up(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Tells the keeper how far a machine has come in.
struct IncomingObserver {
    keeper: KeeperHandle,
    /// The machine is here, and only some of its memory is still to come.
    is_here: AtomicBool,
}

impl Observer for IncomingObserver {
    fn event(&self, event: Event) {
        match event {
            Event::Phase { phase } if self.is_here.load(Ordering::Acquire) => self.keeper.filling_phase(phase),
            Event::Phase { phase } => self.keeper.incoming_phase(phase),
            Event::Round(_) => {}
            Event::Decision { text } => self.keeper.incoming_decision(&text),
        }
    }
}
