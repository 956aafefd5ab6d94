//! Finding out what this host has, without changing anything.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use godwit_core::Refusal;
use kvm_ioctls::{Kvm, VcpuFd};

use super::HostOptions;
use crate::config::SerialTarget;
use crate::cpuid::{self, Feature};
use crate::description::Described;
use crate::error::{VmmError, chain};
use crate::kvm::{ReadyVm, Vm};
use crate::machine::host_tsc_khz;
use crate::preflight::{HostFacts, MemoryFacts};
use crate::vcpu::msr;

/// What this host has for such a machine, or every reason why that does not even come to a comparison.
/// `ready`: a VM to ask, made if there is none yet.
pub(super) fn gather(
    machine: &Described,
    options: &HostOptions,
    ready: &mut Option<ReadyVm>,
) -> Result<HostFacts, Vec<Refusal>> {
    let refused = |error: VmmError| vec![Refusal::new("kvm", chain(&error))];
    let kvm = Vm::open_kvm().map_err(refused)?;
    let missing = Vm::missing(&kvm);
    if !missing.is_empty() {
        return Err(missing.iter().map(|what| Refusal::new("kvm", format!("this host's KVM lacks {what}"))).collect());
    }
    let vm = match ready.take() {
        Some(vm) => vm,
        None => ReadyVm::new().map_err(refused)?,
    };
    let mut facts = probe(&kvm, ready.insert(vm), machine).map_err(refused)?;
    for name in &options.mask_cpu_features {
        let feature = Feature::named(name);
        feature
            .ok_or_else(|| vec![Refusal::new("cpu", format!("no CPU feature is called {name:?}"))])?
            .hide(&mut facts.offered);
    }
    if let Some(tsc_khz) = options.pretend_tsc_khz {
        (facts.tsc_khz, facts.tsc_scaling) = (tsc_khz, false);
    }
    Ok(facts)
}

/// Asks a VM that nothing has been built in.
fn probe(kvm: &Kvm, ReadyVm { vm, vcpu }: &ReadyVm, machine: &Described) -> Result<HostFacts, VmmError> {
    let tsc_khz = host_tsc_khz(vcpu)?;
    Ok(HostFacts {
        offered: cpuid::offered(kvm, machine.config.vcpus, tsc_khz)?,
        msrs: msrs_of_guest(machine, vcpu)?,
        xsave_bytes: vm.xsave_bytes(),
        tsc_khz,
        tsc_scaling: vm.tsc_control(),
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        memory: memory(),
    })
}

/// Which of the machine's MSRs a vCPU has here that shows the guest what it has been shown.
fn msrs_of_guest(machine: &Described, vcpu: &VcpuFd) -> Result<Vec<u32>, VmmError> {
    if let Some(table) = machine.identity.cpuid.first()
        && let Err(error) = vcpu.set_cpuid2(&cpuid::for_kvm(table)?)
    {
        return Err(VmmError::kvm("KVM refuses the guest's CPUID")(error));
    }
    msr::readable(vcpu, machine.identity.shape.msrs.clone())
}

/// What memory there is, as the kernel counts it. What it does not tell counts as there: too little shows up when memory is
/// mapped.
fn memory() -> MemoryFacts {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let strict = fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2");
    memory_facts(&meminfo, strict)
}

fn memory_facts(meminfo: &str, strict_overcommit: bool) -> MemoryFacts {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let kib = |name| field(name).map(|kib| kib << 10);
    let commit_left = || Some(kib("CommitLimit")?.saturating_sub(kib("Committed_AS")?));
    MemoryFacts {
        available_bytes: kib("MemAvailable").unwrap_or(u64::MAX),
        huge_free_bytes: field("HugePages_Free").unwrap_or(0) * kib("Hugepagesize").unwrap_or(0),
        commit_left_bytes: if strict_overcommit { commit_left() } else { None },
    }
}

/// Whether a serial port could be connected to `target`.
pub(super) fn check_serial(target: &SerialTarget) -> Result<(), String> {
    let (SerialTarget::Pty(path) | SerialTarget::Unix(path) | SerialTarget::File(path)) = target else { return Ok(()) };
    let failed = |reason: &str| Err(format!("cannot connect the serial port to {target}: {reason}"));
    if let (SerialTarget::File(_), Ok(metadata)) = (target, fs::metadata(path)) {
        return match metadata.is_dir() {
            true => failed("it is a folder"),
            false if writable(path) => Ok(()),
            false => failed("it may not be written"),
        };
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        failed("its folder does not exist")
    } else if writable(folder) {
        Ok(())
    } else {
        failed("its folder may not be written")
    }
}

fn writable(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: the path is a C string that lives through the call.
    unsafe { libc::access(path.as_ptr(), libc::W_OK) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24684148 kB\nMemAvailable:   24300000 kB\nCommitLimit:    12000000 kB\n\
        Committed_AS:   13000000 kB\nHugePages_Total:       8\nHugePages_Free:        3\nHugepagesize:       2048 kB\n";

    #[test]
    fn memory_is_counted_as_the_kernel_tells() {
        let facts = memory_facts(MEMINFO, true);
        assert_eq!(facts.available_bytes, 24_300_000 << 10);
        assert_eq!(facts.huge_free_bytes, 3 * (2 << 20));
        assert_eq!(facts.commit_left_bytes, Some(0));
        assert_eq!(memory_facts(MEMINFO, false).commit_left_bytes, None);
        assert_eq!(memory_facts("", false).available_bytes, u64::MAX);
    }

    #[test]
    fn a_serial_target_is_judged_without_touching_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        assert_eq!(check_serial(&SerialTarget::File(file.clone())), Ok(()));
        assert!(!file.exists());
        assert!(check_serial(&SerialTarget::File(folder.path().into())).is_err());
        assert!(check_serial(&SerialTarget::Unix(folder.path().join("missing/socket"))).is_err());
        assert_eq!(check_serial(&SerialTarget::Stdio), Ok(()));
    }
}
