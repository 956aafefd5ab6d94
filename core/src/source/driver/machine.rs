//! What the machine is asked to do, on the machine's thread.

use std::os::fd::AsFd;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::super::control::NotOffered;
use super::super::jobs;
use super::{Data, Done, Driver, Event, Input, Told};
use crate::link::ControlLink;
use crate::machine::{Hold, Inquiry, MachineError, SourceMachine};
use crate::memory_files::{self, MemoryOffer};
use crate::message::Message;
use crate::priority::run_promptly;
use crate::sync::lock;

/// What was asked of the destination, between its question and the judgement of the answer. Only the machine's thread touches it.
pub(super) type Inquiring = Arc<Mutex<Option<Box<dyn Inquiry>>>>;

type Job = Box<dyn FnOnce() + Send>;

/// The machine's thread: one thing after the other.
pub(super) struct Jobs {
    machine: Arc<dyn SourceMachine>,
    events: Sender<Event>,
    queue: Sender<Job>,
}

impl Jobs {
    /// Starts the thread. Without it, jobs fail to be queued and the move ends with that error.
    pub(super) fn start(machine: Arc<dyn SourceMachine>, events: Sender<Event>) -> Self {
        let (queue, jobs) = mpsc::channel::<Job>();
        let _ = thread::Builder::new().name("machine-jobs".into()).spawn(move || {
            let _prompt = run_promptly();
            jobs.into_iter().for_each(|job| job());
        });
        Self { machine, events, queue }
    }

    /// Runs `job` once those before it are done. False if there is no thread.
    fn queue(&self, job: impl FnOnce(&dyn SourceMachine, &Sender<Event>) + Send + 'static) -> bool {
        let (machine, events) = (Arc::clone(&self.machine), self.events.clone());
        self.queue.send(Box::new(move || job(&*machine, &events))).is_ok()
    }
}

impl Driver {
    /// Runs `job` on the machine's thread; its result comes back as an input.
    pub(super) fn job(&mut self, job: impl FnOnce(&dyn SourceMachine) -> Result<Done, MachineError> + Send + 'static) {
        let queued = self.jobs.queue(move |machine, events| {
            let input = match job(machine) {
                Ok(done) => Input::Done(done),
                Err(error) => Input::Failed(error.to_string()),
            };
            // Nobody listens any more: the move is over.
            let _ = events.send(input.into());
        });
        if !queued {
            self.input(Input::Failed("no thread could be started for the machine".into()));
        }
    }

    pub(super) fn describe(&mut self) {
        let inquiry = Arc::clone(&self.inquiry);
        self.job(move |machine| {
            let (description, asked) = (machine.describe()?, machine.inquire()?);
            let question = asked.question();
            *lock(&inquiry) = Some(asked);
            Ok(Done::Described(description, question))
        });
    }

    /// Passes the files behind the machine's memory on, if the link can and there are any.
    pub(super) fn offer_memory(&mut self) {
        let offered = match self.handle.link() {
            Some(link) if link.passes_files() => self.pass_memory_on(&link).map_err(NotOffered::Memory),
            _ => Err(NotOffered::Link),
        };
        if let Err(why) = offered {
            self.input(Input::Done(Done::NotOffered(why)));
        }
    }

    fn pass_memory_on(&self, link: &ControlLink) -> Result<(), String> {
        let files = memory_files::of(&self.machine.memory())?;
        let offer = MemoryOffer::new(&files).map_err(|error| error.to_string())?;
        let descriptors: Vec<_> = files.iter().map(|file| file.file.as_fd()).collect();
        // As with every message, a link that breaks is left to the reading side to report.
        if let Err(error) = link.send_with_files(&Message::Memory(offer), &descriptors) {
            tracing::debug!("cannot pass memory on: {error}");
        }
        Ok(())
    }

    /// Does what would make the pause longer, while the guest runs.
    pub(super) fn flush(&mut self) {
        self.job(|machine| {
            machine.settle();
            Ok(Done::Flushed)
        });
    }

    pub(super) fn judge(&mut self, evidence: Vec<u8>) {
        let inquiry = Arc::clone(&self.inquiry);
        self.job(move |_| {
            let asked = lock(&inquiry).take();
            Ok(Done::Judged(asked.map(|asked| asked.judge(&evidence)).unwrap_or_default()))
        });
    }

    /// Holds the vCPUs back that write. Nobody waits for it.
    pub(super) fn throttle(&mut self, hold: Hold) {
        self.note_held(hold.share);
        if !self.jobs.queue(move |machine, _| machine.throttle(hold)) {
            self.input(Input::Failed("no thread could be started for the machine".into()));
        }
    }

    fn note_held(&mut self, share: f64) {
        if let Some(watch) = &mut self.watch {
            watch.held(self.handle.flow.now(), share);
        }
    }

    pub(super) fn stop_guest(&mut self) {
        // Stopping it lifts a throttle.
        self.note_held(1.0);
        let data = self.data.as_ref().map(|data| (Arc::clone(&data.shared), Arc::clone(&data.harvester)));
        let (ownership, handle) = (self.ownership.clone(), Arc::clone(&self.handle));
        self.settler = None;
        self.job(move |machine| {
            let now = || handle.flow.now();
            let limit = handle.pause_timeout;
            let dirty = data.as_ref().map(|(shared, harvester)| (&shared.pages, &**harvester));
            jobs::stop_guest(machine, ownership.as_deref(), dirty, limit, &now)
        });
    }

    pub(super) fn settle(&mut self, patience: Duration) {
        let Some(holding) = self.ownership.clone() else { return };
        let observer = Arc::clone(&self.observer);
        self.job(move |_| {
            let tell = |text: &str| {
                tracing::warn!("{text}");
                observer.event(Told::Decision { text: text.into() });
            };
            Ok(Done::Settled(holding.settle(Some(Instant::now() + patience), tell)))
        });
    }

    /// The links broke, and are to be made anew.
    pub(super) fn break_off(&mut self, resume: bool) {
        self.leave_links();
        let workers = self.data.as_mut().map(Data::dismiss).unwrap_or_default();
        let serving = self.pages.dismiss();
        let ownership = self.ownership.clone();
        let queued = self.jobs.queue(move |machine, events| {
            // The guest first: it has waited long enough.
            if let Err(error) = jobs::take_back(machine, ownership.as_deref(), resume) {
                let _ = events.send(Input::Failed(error.to_string()).into());
            }
            serving.into_iter().for_each(|thread| drop(thread.join()));
            let channels = workers.into_iter().map(|worker| worker.join()).collect::<Result<Vec<_>, _>>();
            let _ = events.send(match channels {
                Ok(channels) => Event::BrokenOff(channels),
                Err(_) => Input::Failed("a data channel's thread panicked".into()).into(),
            });
        });
        if !queued {
            self.input(Input::Failed("no thread could be started for the machine".into()));
        }
    }

    /// The move has come to nothing: the guest is made as it was.
    pub(super) fn restore(&mut self, resume: bool) {
        let workers = self.data.as_mut().map(Data::dismiss).unwrap_or_default();
        let serving = self.pages.dismiss();
        let logging = self.data.is_some();
        let (inquiry, ownership) = (Arc::clone(&self.inquiry), self.ownership.clone());
        self.settler = None;
        let queued = self.jobs.queue(move |machine, events| {
            let resumed = jobs::restore(machine, ownership.as_deref(), resume);
            workers.into_iter().for_each(|worker| drop(worker.join()));
            serving.into_iter().for_each(|thread| drop(thread.join()));
            let stopped = if logging { machine.dirty_log().stop() } else { Ok(()) };
            drop(lock(&inquiry).take());
            let result = resumed.and(stopped).map_err(|error| error.to_string());
            let _ = events.send(Input::Done(Done::Restored(result)).into());
        });
        if !queued {
            self.input(Input::Done(Done::Restored(Err("no thread could be started for the machine".into()))));
        }
    }
}
