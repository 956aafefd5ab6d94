//! What goes wrong, done to the world.

use std::time::Duration;

use godwit_core::postcopy::PageChannel;

use crate::chance::ms;
use crate::event::{Act, Event};
use crate::network::{HOSTS, Kind};
use crate::process::Role;
use crate::setup::Fault;
use crate::world::World;

impl World {
    /// It is time for a fault of the plan.
    pub fn fault(&mut self, number: usize) {
        let fault = self.setup.faults[number].fault;
        self.note(format_args!("FAULT: {fault:?}"));
        let Some((source, destination)) = self.current else { return };
        let hosts = (self.processes[source].host, self.processes[destination].host);
        let now = self.now();
        match fault {
            Fault::CutControl => self.cut(source, |kind| kind == Kind::Control),
            Fault::CutData => {
                let pages = Kind::Pages(*self.chance.pick(&[PageChannel::Fault, PageChannel::Push]));
                self.cut(source, |kind| kind == Kind::Data(0) || kind == pages);
            }
            Fault::CutAll => self.cut(source, |_| true),
            Fault::Block(there, back, duration) => {
                if there {
                    self.network.block(hosts.0, hosts.1, now + duration, &mut self.agenda);
                }
                if back {
                    self.network.block(hosts.1, hosts.0, now + duration, &mut self.agenda);
                }
                self.heals_at(duration);
            }
            Fault::Corrupt => self.corrupt(source),
            Fault::KillSource => self.kill(source),
            Fault::KillDestination => self.kill(destination),
            Fault::SourceHostDies => self.host_dies(hosts.0),
            Fault::DestinationHostDies => self.host_dies(hosts.1),
            Fault::Cancel => self.act(Act::Cancel),
            Fault::Abandon => self.act(Act::Abandon(source)),
            Fault::SlowDisk(by) => {
                let duration = self.chance.time(ms(10), Duration::from_secs(10));
                self.slow_disk = (by, now + duration);
            }
            Fault::StoreAway(there, here, duration) => {
                if there {
                    self.store.block(hosts.0, now + duration);
                }
                if here {
                    self.store.block(hosts.1, now + duration);
                }
                self.heals_at(duration);
            }
            Fault::Unsettle(calls) => self.store.unsettle(calls),
        }
    }

    fn heals_at(&mut self, duration: Duration) {
        self.healed_at = self.healed_at.max(self.now() + duration);
    }

    fn cut(&mut self, process: usize, which: impl Fn(Kind) -> bool) {
        for (id, _) in self.network.of(process) {
            if which(self.network.kind(id)) {
                self.network.cut(id, &mut self.chance, &mut self.agenda);
            }
        }
    }

    /// Only where there is a table by which it is found.
    fn corrupt(&mut self, process: usize) {
        if !self.setup.options.verify {
            return;
        }
        let data = |(id, side): &(usize, usize)| *side == 0 && self.network.kind(*id) != Kind::Control;
        let data: Vec<_> = self.network.of(process).into_iter().filter(data).collect();
        if data.is_empty() {
            return;
        }
        let (id, _) = *self.chance.pick(&data);
        if self.network.corrupt(id, 1, &mut self.chance) {
            self.note(format_args!("a bit has changed on the way"));
        }
    }

    /// A process is killed.
    pub fn kill(&mut self, process: usize) {
        if !self.processes[process].alive {
            return;
        }
        self.ends(process);
        self.calm = false;
        for (id, side) in self.network.of(process) {
            self.network.close(id, side, &mut self.agenda);
        }
        let host = self.processes[process].host;
        if self.chance.hit(0.3) {
            let delay = self.chance.time(ms(20), Duration::from_secs(5));
            self.agenda.after(delay, Event::Person(Act::Run(host)));
        }
    }

    /// A host loses power. It is back soon, with nothing running.
    fn host_dies(&mut self, host: usize) {
        debug_assert!(host < HOSTS);
        self.boots[host] += 1;
        self.calm = false;
        for process in 0..self.processes.len() {
            if self.processes[process].host == host && self.processes[process].alive {
                for (id, side) in self.network.of(process) {
                    self.network.forget(id, side, &mut self.agenda);
                }
                self.ends(process);
            }
        }
        if self.chance.hit(0.3) {
            let delay = self.chance.time(ms(500), Duration::from_secs(20));
            self.agenda.after(delay, Event::Person(Act::Run(host)));
        }
    }

    /// A process is no more. What it has asked of the store may still take effect.
    pub fn ends(&mut self, process: usize) {
        self.store.forget(process);
        let state = &mut self.processes[process];
        state.alive = false;
        state.part += 1;
        state.role = Role::Over;
        state.machine = None;
        state.holding = None;
        state.marking = None;
    }
}
