//! What a seed is like: the machine, the options of its moves, and how much goes wrong.

use std::time::Duration;

use godwit_core::machine::{MachineDescription, RegionDescription};
use godwit_core::source::{Compression, OnStall, SourceOptions};
use godwit_core::{PAGE_SIZE, Phase};

use crate::chance::{Chance, ms, us};
use crate::machine;
use crate::verdict::PATIENT_PAUSE;

/// The machine's name.
pub const MACHINE: &str = "m";

/// How this seed is.
pub struct Setup {
    /// The machine.
    pub description: MachineDescription,
    /// Whether ownership passes by claims.
    pub claims: bool,
    /// Both ends could map the machine's memory: it is handed over, unless the options say otherwise.
    pub one_host: bool,
    /// The knobs of its moves.
    pub options: SourceOptions,
    /// The time between two things that the guest does while a move is under way.
    pub guest_interval: Duration,
    /// How often the guest writes to its disk, too.
    pub disk_share: f64,
    /// How long a disk write takes.
    pub disk_latency: Duration,
    /// How likely the guest writes in the middle of a call to the dirty log.
    pub meddling: f64,
    /// The guest writes whole pages only.
    pub whole_pages: bool,
    /// How long blocking work takes: preparing, saving, loading.
    pub work: Duration,
    /// How often calls to the claim store have unusual fates, once the machine runs.
    pub store_trouble: f64,
    /// Moves that are tried at most.
    pub moves: u32,
    /// Somebody wants the move to go over to post-copy, so long after it has entered this phase.
    pub asks_for_postcopy: Option<(Phase, Duration)>,
    /// What goes wrong.
    pub faults: Vec<Planned>,
}

/// A fault, and when it comes.
#[derive(Debug, Clone, Copy)]
pub struct Planned {
    /// When.
    pub when: When,
    /// What.
    pub fault: Fault,
}

/// When a fault comes.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// So long after the machine was started.
    At(Duration),
    /// So long after a move has entered a phase.
    In(Phase, Duration),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The control channel breaks.
    CutControl,
    /// A data channel breaks.
    CutData,
    /// Every connection breaks.
    CutAll,
    /// Nothing gets through, in these directions (to the destination, to the source), for so long.
    Block(bool, bool, Duration),
    /// A bit changes on the way, on a data channel.
    Corrupt,
    /// The source's process is killed.
    KillSource,
    /// The destination's process is killed.
    KillDestination,
    /// The source's host loses power.
    SourceHostDies,
    /// The destination's host loses power.
    DestinationHostDies,
    /// Somebody cancels.
    Cancel,
    /// Somebody says in post-copy that the destination is dead, rightly or not.
    Abandon,
    /// Disk writes take so long for a while.
    SlowDisk(Duration),
    /// The source (if set), the destination (if set) do not reach the claim store, for so long.
    StoreAway(bool, bool, Duration),
    /// So many calls to the claim store have uncertain fates.
    Unsettle(u32),
}

impl Setup {
    /// Draws one.
    pub fn draw(chance: &mut Chance) -> Self {
        let claims = !chance.hit(0.06);
        let faults = match chance.below(100) {
            0..12 => 0,
            12..45 => 1,
            45..75 => 2,
            75..90 => 3,
            _ => 6,
        };
        let mut setup = Self {
            description: describe(chance),
            claims,
            one_host: chance.hit(0.1),
            options: options(chance),
            guest_interval: chance.time(us(300), ms(50)),
            disk_share: *chance.pick(&[0.0, 0.05, 0.3]),
            disk_latency: chance.time(us(100), ms(30)),
            meddling: *chance.pick(&[0.0, 0.1, 0.5]),
            whole_pages: false,
            work: chance.time(us(50), ms(20)),
            store_trouble: if chance.hit(0.2) { 0.1 } else { 0.0 },
            moves: 1 + chance.below(3) as u32,
            asks_for_postcopy: None,
            faults: (0..faults).map(|_| plan(chance)).collect(),
        };
        setup.consider_postcopy(chance);
        let stalls = matches!(setup.options.on_stall, OnStall::Throttle | OnStall::PostCopy);
        if (stalls || setup.asks_for_postcopy.is_some()) && chance.hit(0.7) {
            setup.overburden(chance);
        }
        setup
    }

    /// The guest writes more than can be sent in time, unless something is done about it.
    fn overburden(&mut self, chance: &mut Chance) {
        let options = &mut self.options;
        options.max_bandwidth_bytes_per_s = Some(chance.amount(2e5, 2e6) as u64);
        options.switchover_bandwidth_bytes_per_s = Some(chance.amount(2e5, 1e6) as u64);
        options.downtime_limit = chance.time(ms(60), ms(200));
        options.max_rounds = 4 + chance.below(20) as u32;
        self.guest_interval = chance.time(us(300), ms(3));
        // Many rounds are many chances for a break to leave something half sent, if it is sent as it is.
        if chance.hit(0.4) {
            (options.compression, options.delta_cache_bytes) = (Compression::None, 0);
            self.whole_pages = true;
        }
        for planned in &mut self.faults {
            if chance.hit(0.3) {
                let when = When::In(Phase::Rounds, chance.time(ms(1), Duration::from_secs(1)));
                *planned = Planned { when, fault: *chance.pick(&[Fault::CutData, Fault::CutAll]) };
            }
        }
        let mut address = 0;
        for region in &mut self.description.memory {
            let size_bytes = (10 + chance.below(30) as u64) * PAGE_SIZE as u64;
            *region = RegionDescription { guest_address: address, size_bytes };
            address += size_bytes;
        }
        self.work = chance.time(us(50), ms(1));
    }

    /// Some moves go over to post-copy, and then most of what goes wrong does so in it.
    fn consider_postcopy(&mut self, chance: &mut Chance) {
        let options = &mut self.options;
        match chance.below(100) {
            0..18 => options.on_stall = OnStall::PostCopy,
            18..30 => {
                let phase = *chance.pick(&[Phase::FirstPass, Phase::Rounds, Phase::PreSwitchover]);
                self.asks_for_postcopy = Some((phase, chance.time(us(10), ms(500))));
            }
            _ => return,
        }
        if options.reconnect_timeout.is_zero() && chance.hit(0.8) {
            options.reconnect_timeout = chance.time(ms(100), Duration::from_secs(20));
        }
        let phases =
            [Phase::State, Phase::Commit, Phase::PostCopy, Phase::PostCopy, Phase::PostCopy, Phase::PostCopyPaused];
        for planned in &mut self.faults {
            if !chance.hit(0.7) {
                continue;
            }
            planned.when = When::In(*chance.pick(&phases), chance.time(us(10), ms(500)));
            let long = chance.time(ms(1), Duration::from_secs(40));
            planned.fault = match chance.below(10) {
                0..2 => Fault::CutAll,
                2 => Fault::CutData,
                3 => Fault::Block(true, true, long),
                4 => Fault::Abandon,
                5 => Fault::Corrupt,
                _ => planned.fault,
            };
        }
    }
}

fn describe(chance: &mut Chance) -> MachineDescription {
    let mut address = 0;
    let mut memory = Vec::new();
    for _ in 0..2 + chance.below(4) {
        // Now and then a region of more than one stripe.
        let pages = if chance.hit(0.01) { 514 + chance.below(80) } else { 1 + chance.below(20) } as u64;
        memory.push(RegionDescription { guest_address: address, size_bytes: pages * PAGE_SIZE as u64 });
        address += (pages + chance.below(3) as u64) * PAGE_SIZE as u64;
    }
    MachineDescription { name: MACHINE.into(), vcpus: 1, memory, sections: machine::sections(), vmm: Vec::new() }
}

fn options(chance: &mut Chance) -> SourceOptions {
    let seconds = |seconds| Duration::from_secs(seconds);
    SourceOptions {
        max_bandwidth_bytes_per_s: chance.hit(0.3).then(|| chance.amount(2e5, 1e8) as u64),
        switchover_bandwidth_bytes_per_s: chance.hit(0.6).then(|| chance.amount(1e5, 1e9) as u64),
        downtime_limit: chance.time(ms(20), seconds(1)),
        pause_timeout: if chance.hit(0.5) { PATIENT_PAUSE } else { chance.time(ms(50), seconds(5)) },
        reconnect_timeout: if chance.hit(0.3) { Duration::ZERO } else { chance.time(ms(100), seconds(20)) },
        handover_timeout: chance.time(seconds(1), seconds(30)),
        timeout: chance.hit(0.2).then(|| chance.time(ms(100), seconds(5))),
        max_rounds: 1 + chance.below(10) as u32,
        on_stall: *chance.pick(&[OnStall::Force, OnStall::Force, OnStall::Throttle, OnStall::Abort]),
        pause_before_switchover: chance.hit(0.05),
        channels: 1 + chance.below(3) as u16,
        compression: *chance.pick(&[Compression::None, Compression::Auto, Compression::Zstd(1)]),
        delta_cache_bytes: *chance.pick(&[0, 16 << 10, 1 << 20]),
        verify: !chance.hit(0.05),
        audit: true,
        ..SourceOptions::default()
    }
}

fn plan(chance: &mut Chance) -> Planned {
    const HANDOVER: [Phase; 5] = [Phase::Pause, Phase::FinalPages, Phase::State, Phase::Commit, Phase::Commit];
    let soon = chance.time(us(10), ms(500));
    let when = match chance.below(10) {
        0 => When::At(chance.time(ms(50), Duration::from_secs(10))),
        1..3 => {
            // Where a move goes over to post-copy, more comes in that (see there).
            let before = |phase: &&Phase| !matches!(phase, Phase::PostCopy | Phase::PostCopyPaused);
            let phases: Vec<_> = Phase::all().iter().filter(before).copied().collect();
            When::In(*chance.pick(&phases), soon)
        }
        3..5 => When::In(*chance.pick(&[Phase::FirstPass, Phase::Rounds]), soon),
        _ => When::In(*chance.pick(&HANDOVER), soon),
    };
    let long = chance.time(ms(1), Duration::from_secs(40));
    let (one, other) = *chance.pick(&[(true, false), (false, true), (true, true)]);
    let fault = match chance.below(28) {
        0..3 => Fault::CutControl,
        3..5 => Fault::CutData,
        5..8 => Fault::CutAll,
        8..13 => Fault::Block(one, other, long),
        13 => Fault::Corrupt,
        14..16 => Fault::KillSource,
        16..18 => Fault::KillDestination,
        18 => *chance.pick(&[Fault::SourceHostDies, Fault::DestinationHostDies]),
        19..21 => Fault::Cancel,
        21 => Fault::SlowDisk(chance.time(ms(20), Duration::from_secs(8))),
        22..25 => Fault::StoreAway(one, other, long),
        _ => Fault::Unsettle(1 + chance.below(4) as u32),
    };
    // A connection that breaks while memory is being sent is made anew: that has its own ways to lose something.
    if let Fault::CutControl | Fault::CutData | Fault::CutAll = fault
        && chance.hit(0.5)
    {
        let when = When::In(*chance.pick(&[Phase::FirstPass, Phase::Rounds]), chance.time(us(10), ms(50)));
        return Planned { when, fault };
    }
    Planned { when, fault }
}
