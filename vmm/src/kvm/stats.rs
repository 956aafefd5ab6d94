//! What KVM counts of a vCPU (binary statistics, Linux 5.14): the page faults that it took.
//!
//! While the dirty log runs, a first write to a page is a fault, where KVM protects pages to see it. So the faults tell which
//! vCPUs write. Where the CPU itself logs writes (Intel's page modification logging) there are none, and they tell nothing.

use std::fs::{self, File};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// `struct kvm_stats_header` of the kernel's documentation (virt/kvm/api.rst): six words of 32 bits.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` up to the name.
const DESCRIPTOR_BYTES: usize = 16;
/// More descriptors, or longer names, than any kernel has.
const MOST_DESCRIPTORS: u32 = 1024;
const LONGEST_NAME: u32 = 256;

const FAULTS: &[u8] = b"pf_taken";

/// Set where Intel CPUs log writes by themselves.
const PML: &str = "/sys/module/kvm_intel/parameters/pml";

/// The faults of one vCPU.
pub(crate) struct FaultCounter {
    stats: File,
    offset: u64,
}

impl FaultCounter {
    /// `None` where the kernel does not count, or faults do not tell who writes.
    pub(crate) fn open(vcpu: &VcpuFd) -> Option<Self> {
        if fs::read_to_string(PML).is_ok_and(|pml| pml.trim() == "Y") {
            return None;
        }
        // SAFETY: the call takes no argument.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: a new descriptor, which nobody else has.
        let stats = unsafe { File::from_raw_fd(fd) };
        let offset = find(&stats)?;
        Some(Self { stats, offset })
    }

    /// Faults so far.
    pub(crate) fn read(&self) -> Option<u64> {
        let mut value = [0; 8];
        self.stats.read_exact_at(&mut value, self.offset).ok()?;
        Some(u64::from_ne_bytes(value))
    }
}

/// Where the counter is in the file.
fn find(stats: &File) -> Option<u64> {
    let mut header = [0; HEADER_BYTES];
    stats.read_exact_at(&mut header, 0).ok()?;
    let [_, name_bytes, count, _, descriptors, data] = words(&header)?;
    if count > MOST_DESCRIPTORS || name_bytes > LONGEST_NAME {
        return None;
    }
    let length = DESCRIPTOR_BYTES + name_bytes as usize;
    let mut descriptor = vec![0; length];
    for index in 0..u64::from(count) {
        stats.read_exact_at(&mut descriptor, u64::from(descriptors) + index * length as u64).ok()?;
        let (fields, name) = descriptor.split_at(DESCRIPTOR_BYTES);
        if name.split(|byte| *byte == 0).next() == Some(FAULTS) {
            let [_, _, offset, _] = words(fields)?;
            return Some(u64::from(data) + u64::from(offset));
        }
    }
    None
}

fn words<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}
