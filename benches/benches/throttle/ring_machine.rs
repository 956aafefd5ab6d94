//! As much of a VMM as the workload guest needs, with dirty rings: the product's machines have the bitmap, and a VM has one or the other.

use std::io::{self, Cursor};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_benches::dirty_ring::{DirtyRing, ENTRY_BYTES};
use godwit_core::GuestMemory;
use godwit_vmm::config::MemoryBacking;
use godwit_vmm::guest_memory;
use godwit_vmm::workload::{WriterConfig, elf};
use kvm_bindings::{
    CpuId, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::holding::Holding;

/// Where the guest is told of its memory, and what it is told.
const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const HIGH_MEMORY: u64 = 0x10_0000;

/// Where Intel hosts keep what real mode needs.
const TSS_ADDRESS: usize = 0xfffb_d000;

const CR0_PE_ET: u64 = 1 << 0 | 1 << 4;
const RFLAGS_FIXED: u64 = 1 << 1;

/// A VM with dirty rings that runs the workload guest.
pub struct RingMachine {
    pub memory: GuestMemory,
    vm: Arc<VmFd>,
    pub holding: Arc<Holding>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl RingMachine {
    /// Boots the guest, with rings of `entries` entries. Its writes are not logged yet.
    pub fn boot(memory_bytes: u64, writer: &WriterConfig, vcpus: u64, entries: usize, at_full: bool) -> Result<Self> {
        // The handler has nothing to do: that a signal arrives makes a vCPU leave KVM_RUN.
        register_signal_handler(SIGRTMIN(), on_kick).context("cannot install the signal handler")?;
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = kvm.create_vm().context("cannot create a VM")?;
        vm.set_tss_address(TSS_ADDRESS)?;
        vm.create_irq_chip()?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
        let mut rings = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ..Default::default() };
        rings.args[0] = (entries * ENTRY_BYTES) as u64;
        vm.enable_cap(&rings).context("this host's KVM has no dirty rings of that size")?;

        let memory = guest_memory(memory_bytes, MemoryBacking::Private, false)?;
        set_memory(&vm, &memory, false)?;
        let fds = (0..vcpus).map(|id| create_vcpu(&kvm, &vm, id)).collect::<Result<Vec<_>>>()?;
        enter(&fds[0], load(&memory, writer)?)?;

        let rings = fds.iter().map(|fd| DirtyRing::map(fd, entries)).collect::<io::Result<_>>()?;
        let vm = Arc::new(vm);
        let holding = Arc::new(Holding::new(Arc::clone(&vm), rings, at_full));
        let stop = Arc::new(AtomicBool::new(false));
        let threads =
            fds.into_iter().enumerate().map(|(id, fd)| run(id, fd, &holding, &stop)).collect::<io::Result<_>>()?;
        Ok(Self { memory, vm, holding, threads, stop })
    }

    /// Writes are logged from here on.
    pub fn start_log(&self) -> Result<()> {
        set_memory(&self.vm, &self.memory, true)
    }

    /// Makes a vCPU leave KVM_RUN. A kick that arrives just before KVM_RUN is lost: whoever needs it kicks again.
    pub fn kick(&self, vcpu: usize) {
        // A thread that has ended needs none.
        let _ = self.threads[vcpu].kill(SIGRTMIN());
    }
}

impl Drop for RingMachine {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                eprintln!("a vCPU's thread panicked");
            }
        }
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run(id: usize, mut fd: VcpuFd, holding: &Arc<Holding>, stop: &Arc<AtomicBool>) -> io::Result<JoinHandle<()>> {
    let (holding, stop) = (Arc::clone(holding), Arc::clone(stop));
    thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        while !stop.load(Relaxed) {
            match fd.run() {
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => holding.ring_is_full(id),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
                Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
                Ok(exit) => panic!("vCPU {id}: {exit:?}"),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => panic!("vCPU {id}: KVM_RUN: {error}"),
            }
            holding.rest(id, &stop);
        }
    })
}

fn set_memory(vm: &VmFd, memory: &GuestMemory, log: bool) -> Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of this process. Should it go before the VM does, KVM drops it from the guest too.
        unsafe { vm.set_user_memory_region(slot) }.context("cannot set a memory slot")?;
    }
    Ok(())
}

fn create_vcpu(kvm: &Kvm, vm: &VmFd, id: u64) -> Result<VcpuFd> {
    let fd = vm.create_vcpu(id).with_context(|| format!("cannot create vCPU {id}"))?;
    let mut cpuid: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => (leaf.ebx, leaf.ecx) = (leaf.ebx & 0x00ff_ffff | (id as u32) << 24, leaf.ecx | 1 << 31),
            0xb | 0x1f => leaf.edx = id as u32,
            _ => {}
        }
    }
    fd.set_cpuid2(&cpuid).context("KVM refuses the CPUID that it supports")?;
    Ok(fd)
}

/// Loads the guest and what it is told: where it begins.
fn load(memory: &GuestMemory, writer: &WriterConfig) -> Result<u32> {
    ensure!(memory.num_regions() == 1, "memory above 3 GiB is not needed here");
    let image = elf(writer);
    let loaded = Elf::load(memory, None, &mut Cursor::new(image), Some(GuestAddress(HIGH_MEMORY)))
        .context("cannot load the workload guest")?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else { bail!("it has no PVH entry point") };
    // hvm_start_info: magic, version, and where the memory map is, of one entry of RAM: address, size, kind.
    let put = |value: u64, address| memory.write_obj(value, GuestAddress(address));
    put(u64::from(START_INFO_MAGIC) | 1 << 32, START_INFO)?;
    put(MEMORY_MAP, START_INFO + 40)?;
    put(1, START_INFO + 48)?;
    put(HIGH_MEMORY, MEMORY_MAP)?;
    put(memory.last_addr().raw_value() + 1 - HIGH_MEMORY, MEMORY_MAP + 8)?;
    put(1, MEMORY_MAP + 16)?;
    Ok(u32::try_from(entry.raw_value())?)
}

/// Puts the first vCPU at a PVH entry point: flat 32-bit protected mode.
fn enter(vcpu: &VcpuFd, entry: u32) -> Result<()> {
    let segment = |selector, type_, s, db| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db,
        s,
        g: s,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = segment(0x18, 0b0011, 1, 1);
    sregs.cs = segment(0x10, 0b1011, 1, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0xffff, ..segment(0x20, 0b1011, 0, 0) };
    (sregs.cr0, sregs.cr4) = (CR0_PE_ET, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: u64::from(entry), rbx: START_INFO, rflags: RFLAGS_FIXED, ..Default::default() })?;
    Ok(())
}
