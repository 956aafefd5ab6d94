//! The storage that all hosts share, as far as claims are concerned: when calls take effect, and who hears of it.

use std::time::Duration;

use godwit_core::ownership::modelled::{Answer, Call, ModelledStore};
use godwit_core::ownership::{CALL_LIMIT, Marker};

use crate::agenda::Agenda;
use crate::chance::{Chance, ms, us};
use crate::event::Event;
use crate::network::HOSTS;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It takes effect; the answer is lost.
    AnswerLost,
    /// It takes effect much later.
    Late,
    /// It never takes effect, and nobody says so.
    Never,
    /// It does nothing, and says so.
    Fails,
    /// It is transmitted twice, and the answer is the second one's.
    Twice,
    /// A look sees the store as it was before.
    Stale,
}

/// All fates but the usual one.
pub const FATES: [Fate; 6] = [Fate::AnswerLost, Fate::Late, Fate::Never, Fate::Fails, Fate::Twice, Fate::Stale];

/// The store, the calls to it, and how the hosts reach it.
pub struct Store {
    /// What is there.
    pub entries: ModelledStore,
    calls: Vec<Pending>,
    away_until: [Duration; HOSTS],
    latency: Duration,
    /// How often calls have unusual fates.
    trouble: f64,
    troubles_left: u32,
}

/// A call that was made.
pub struct Pending {
    /// By whom.
    pub process: usize,
    call: Call,
    fate: Option<Fate>,
    /// Somebody still waits for the answer.
    awaited: bool,
    /// It holds up the process's other calls.
    hangs: bool,
}

impl Store {
    /// An empty store, as this seed has it.
    pub fn new(chance: &mut Chance) -> Self {
        let latency = chance.time(us(20), ms(20));
        Self {
            entries: ModelledStore::default(),
            calls: Vec::new(),
            away_until: [Duration::ZERO; HOSTS],
            latency,
            trouble: 0.0,
            troubles_left: 0,
        }
    }

    /// A host does not reach the store before then.
    pub fn block(&mut self, host: usize, until: Duration) {
        self.away_until[host] = self.away_until[host].max(until);
    }

    /// From here on so many calls have unusual fates, by themselves.
    pub fn trouble(&mut self, probability: f64) {
        self.trouble = probability;
    }

    /// So many of the next calls have unusual fates.
    pub fn unsettle(&mut self, calls: u32) {
        self.troubles_left += calls;
    }

    /// From here on all goes well.
    pub fn heal(&mut self) {
        self.trouble = 0.0;
        self.troubles_left = 0;
    }

    /// A process on a host calls. The number of the call, and what is to become of it.
    pub fn call(
        &mut self,
        (process, host): (usize, usize),
        call: Call,
        chance: &mut Chance,
        agenda: &mut Agenda<Event>,
    ) -> (usize, Option<Fate>) {
        let number = self.calls.len();
        agenda.after(CALL_LIMIT, Event::StoreTimeOut(number));
        if self.calls.iter().any(|earlier| earlier.process == process && earlier.hangs) {
            // One thread makes the calls, and it is still at an earlier one: this one is never made.
            self.calls.push(Pending { process, call, fate: Some(Fate::Never), awaited: true, hangs: false });
            return (number, Some(Fate::Never));
        }
        let troubled = self.troubles_left > 0 || chance.hit(self.trouble);
        self.troubles_left -= u32::from(troubled && self.troubles_left > 0);
        let fate = troubled.then(|| *chance.pick(&FATES)).filter(|fate| match call {
            Call::Look => matches!(fate, Fate::Stale | Fate::Never | Fate::AnswerLost),
            _ => *fate != Fate::Stale,
        });
        let reached = self.away_until[host].max(agenda.now()) + self.latency;
        let effect = match fate {
            Some(Fate::Late) => reached + chance.time(ms(100), Duration::from_secs(20)),
            _ => reached,
        };
        if fate != Some(Fate::Never) {
            agenda.at(effect, Event::StoreEffect(number));
        }
        self.calls.push(Pending { process, call, fate, awaited: true, hangs: fate != Some(Fate::Never) });
        (number, fate)
    }

    /// It is time for a call to take effect. What it was, if it did.
    pub fn take_effect(&mut self, number: usize, agenda: &mut Agenda<Event>) -> &Call {
        let Pending { call, fate, hangs, .. } = &mut self.calls[number];
        *hangs = false;
        let answer = match fate {
            Some(Fate::Fails) => call.failed("the file system is full"),
            Some(Fate::Stale) => self.entries.stale_look(),
            Some(Fate::Twice) => {
                self.entries.take_effect(call);
                self.entries.take_effect(call)
            }
            _ => self.entries.take_effect(call),
        };
        if *fate != Some(Fate::AnswerLost) {
            agenda.after(self.latency, Event::StoreAnswer(number, answer));
        }
        call
    }

    /// An answer is back, or was waited for long enough: for which process, if it still waits, and what it learns.
    pub fn answered(&mut self, number: usize, answer: Option<Answer>) -> Option<(usize, Answer)> {
        let Pending { process, call, awaited, .. } = &mut self.calls[number];
        if !std::mem::replace(awaited, false) {
            return None;
        }
        Some((*process, answer.unwrap_or_else(|| call.unknown("the claim store did not answer in time"))))
    }

    /// What a call was to mark, if it was.
    pub fn marker(&self, number: usize) -> Option<Marker> {
        match self.calls[number].call {
            Call::Mark(_, marker) => Some(marker),
            Call::Claim(_) | Call::Look => None,
        }
    }

    /// Who made a call.
    pub fn caller(&self, number: usize) -> usize {
        self.calls[number].process
    }

    /// A process has died: its calls go on, and nobody waits for them.
    pub fn forget(&mut self, process: usize) {
        self.calls.iter_mut().filter(|call| call.process == process).for_each(|call| call.awaited = false);
    }
}
