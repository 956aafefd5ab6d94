//! Guest memory that is filled while its guest runs in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use godwit_core::{
    DestinationHost, DestinationMachine, FillableMemory, LoadContext, PAGE_SIZE, PageIndex, PageRun, Placed,
    SourceMachine,
};
use godwit_vmm::config::MemoryBacking;
use godwit_vmm::{IncomingMachine, KvmHost, Machine, MachineConfig, workload};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::guests::{heartbeats, pause, run, wait_until, writer};
use crate::Test;

pub(crate) const TESTS: &[Test] = &[
    ("filling::a_guest_runs_while_its_pages_come_in", a_guest_runs_while_its_pages_come_in),
    ("filling::a_guest_that_waits_for_a_page_can_be_stopped", a_guest_that_waits_for_a_page_can_be_stopped),
    ("filling::a_machine_that_boots_anew_lacks_nothing", a_machine_that_boots_anew_lacks_nothing),
];

/// Takes `source`, which is paused, into a machine that has stale memory, all of which is missing.
fn take_in(source: &Machine) -> (IncomingMachine, Arc<dyn FillableMemory>) {
    let (description, mut host) = (source.describe().unwrap(), KvmHost::default());
    assert_eq!(host.check(&description, &[]).refusals, Vec::new());
    host.check_filling(&description).unwrap();
    let mut incoming = host.prepare(&description).unwrap();
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    for region in incoming.memory().iter() {
        let stale = vec![0xee; region.len() as usize];
        incoming.memory().write_slice(&stale, region.start_addr()).unwrap();
    }
    let runs: Vec<_> = source
        .memory()
        .iter()
        .enumerate()
        .map(|(region, mapping)| PageRun { region, pages: 0..mapping.len() / PAGE_SIZE as u64 })
        .collect();
    let memory = incoming.fill_later(&mut runs.into_iter()).unwrap();
    (incoming, memory)
}

fn page_of(source: &Machine, PageIndex { page, .. }: PageIndex) -> [u8; PAGE_SIZE] {
    let mut contents = [0; PAGE_SIZE];
    source.memory().read_slice(&mut contents, GuestAddress(page * PAGE_SIZE as u64)).unwrap();
    contents
}

/// Answers who needs a page, until told to stop.
struct Server {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Server {
    fn start(source: &Machine, memory: &Arc<dyn FillableMemory>) -> Self {
        let (stop, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (source, memory) = (source.clone(), Arc::clone(memory));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = thread::spawn(move || {
            let mut needed = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                needed.clear();
                memory.wait_for_need(Duration::from_millis(5), &mut needed).unwrap();
                for page in &needed {
                    let contents = page_of(&source, *page);
                    memory.place(*page, (contents != [0; PAGE_SIZE]).then_some(&contents)).unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { stop, served, thread }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.served.load(Ordering::Relaxed)
    }
}

fn a_guest_runs_while_its_pages_come_in() {
    for (vcpus, memory_backing) in [(1, MemoryBacking::Private), (2, MemoryBacking::Private), (2, MemoryBacking::Memfd)]
    {
        let source = run(&MachineConfig { memory_backing, ..writer(vcpus) });
        let beats = |machine: &Machine| heartbeats(machine, u64::from(vcpus));
        wait_until("it works", || beats(&source).iter().all(|beat| *beat > 3));
        pause(&source);
        let left_at = beats(&source);
        let (mut incoming, memory) = take_in(&source);
        let server = Server::start(&source, &memory);
        incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
        incoming.start().unwrap();
        let destination = incoming.into_machine();
        assert!(destination.is_filling());
        wait_until("all its vCPUs go on", || beats(&destination).iter().zip(&left_at).all(|(now, then)| now > then));
        // The rest, some of which the guest needs at the same moment.
        let pages = source.config().memory.bytes() / PAGE_SIZE as u64;
        let (mut now, mut already) = (0, 0);
        for page in (0..pages).map(|page| PageIndex { region: 0, page }) {
            match memory.place(page, Some(&page_of(&source, page))).unwrap() {
                Placed::Now => now += 1,
                Placed::Already => already += 1,
                Placed::NotWanted => panic!("it has not ended"),
            }
        }
        assert!(now > 0 && already > 0, "{now} and {already}");
        memory.complete().unwrap();
        assert!(!destination.is_filling());
        assert_eq!(memory.place(PageIndex { region: 0, page: 0 }, None).unwrap(), Placed::NotWanted);
        let served = server.end();
        println!(
            "{memory_backing:?}, {vcpus} vCPUs: {served} pages served, {now} put in place before they were needed"
        );
        let then = beats(&destination);
        wait_until("it works on", || beats(&destination).iter().zip(&then).all(|(now, then)| *now > then + 3));
        pause(&destination);
        workload::check(&destination.memory()).unwrap();
    }
}

/// Nobody answers.
fn a_guest_that_waits_for_a_page_can_be_stopped() {
    let source = run(&writer(1));
    wait_until("it works", || heartbeats(&source, 1)[0] > 3);
    pause(&source);
    let (mut incoming, memory) = take_in(&source);
    let server = Server::start(&source, &memory);
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    server.end();
    incoming.start().unwrap();
    let destination = incoming.into_machine();
    let mut needed = Vec::new();
    wait_until("it needs a page", || {
        memory.wait_for_need(Duration::from_millis(5), &mut needed).unwrap();
        !needed.is_empty()
    });
    // Not every KVM can be interrupted in that; then it ends with the process. No time limit is passed in vain.
    let at_rest = destination.stop();
    println!("at rest: {at_rest}");
    memory.complete().unwrap();
}

fn a_machine_that_boots_anew_lacks_nothing() {
    let source = run(&writer(1));
    wait_until("it works", || heartbeats(&source, 1)[0] > 3);
    pause(&source);
    let (mut incoming, memory) = take_in(&source);
    let server = Server::start(&source, &memory);
    incoming.load(&source.save().unwrap(), &LoadContext::default()).unwrap();
    server.end();
    let destination = incoming.into_machine();
    destination.reset().unwrap();
    assert!(!destination.is_filling());
    assert_eq!(memory.place(PageIndex { region: 0, page: 5 }, Some(&[7; PAGE_SIZE])).unwrap(), Placed::NotWanted);
    assert!(!memory.wait_for_need(Duration::ZERO, &mut Vec::new()).unwrap());
    destination.resume().unwrap();
    wait_until("it works", || heartbeats(&destination, 1)[0] > 3);
}
