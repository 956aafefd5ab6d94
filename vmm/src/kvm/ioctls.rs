//! The calls that kvm-ioctls does not wrap, or not safely: each takes care of its own buffers.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_clear_dirty_log, kvm_device_attr,
    kvm_dirty_log, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

/// In an entry of the I/O APIC's redirection table: nothing is delivered.
const REDIRECTION_MASKED: u64 = 1 << 16;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Copies the dirty bitmap of `slot`, which has `pages` pages, to the start of `words`.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> Result<(), Error> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(Error::new(libc::EINVAL));
    }
    let mut log = kvm_dirty_log { slot, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
    // SAFETY: KVM writes one bit per page of the slot, rounded up to whole words, and `words` has that many.
    check(unsafe { ioctl_with_mut_ref(vm, KVM_GET_DIRTY_LOG(), &mut log) })
}

/// Clears the bits that are set in `words`, for the `pages` pages of `slot` from `first_page` on.
pub(super) fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> Result<(), Error> {
    if words.len() < pages.div_ceil(64) as usize {
        return Err(Error::new(libc::EINVAL));
    }
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: KVM reads one bit for each of `pages`, rounded up to whole words, and `words` has that many. It only reads.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) })
}

/// What is added to the host's (scaled) TSC to make this vCPU's.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset as u64);
    // SAFETY: KVM writes eight bytes to `addr`, which is a u64 that outlives the call.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

/// Sets it.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&raw const offset as u64);
    // SAFETY: KVM reads eight bytes from `addr`, which is a u64 that outlives the call.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr }
}

/// This vCPU's XSAVE area: `size_bytes` of it, which must be what KVM_CAP_XSAVE2 says.
pub(crate) fn xsave(vcpu: &VcpuFd, size_bytes: usize) -> Result<Vec<u8>, Error> {
    let mut area = xsave_area(size_bytes)?;
    if extra_words(size_bytes) == 0 {
        // Also works on kernels that know no KVM_GET_XSAVE2.
        let fixed = vcpu.get_xsave()?;
        return Ok(fixed.region.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    // SAFETY: the area has been allocated with the size that KVM asks for.
    unsafe { vcpu.get_xsave2(&mut area)? };
    let area = area.as_fam_struct_ref();
    let words = area.xsave.region.iter().chain(area.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

/// Sets it. `bytes` may be shorter than `size_bytes` (what KVM_CAP_XSAVE2 says here): the rest is zeros.
pub(crate) fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], size_bytes: usize) -> Result<(), Error> {
    let mut area = xsave_area(size_bytes)?;
    if bytes.len() > size_bytes.max(size_of::<kvm_xsave>()) || !bytes.len().is_multiple_of(4) {
        return Err(Error::new(libc::EINVAL));
    }
    let mut words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    // SAFETY: the length of the flexible array member is not touched.
    let raw = unsafe { area.as_mut_fam_struct() };
    for (slot, word) in raw.xsave.region.iter_mut().zip(&mut words) {
        *slot = word;
    }
    for (slot, word) in raw.as_mut_slice().iter_mut().zip(&mut words) {
        *slot = word;
    }
    // SAFETY: the area has been allocated with the size that KVM reads.
    unsafe { vcpu.set_xsave2(&area) }
}

fn xsave_area(size_bytes: usize) -> Result<Xsave, Error> {
    Xsave::new(extra_words(size_bytes)).map_err(|_| Error::new(libc::ENOMEM))
}

fn extra_words(size_bytes: usize) -> usize {
    size_bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4)
}

/// Whether the I/O APIC passes on what arrives on `line`: a guest that uses a device has unmasked the device's line.
pub(crate) fn line_is_unmasked(vm: &VmFd, line: u32) -> Result<bool, Error> {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.get_irqchip(&mut chip)?;
    // SAFETY: KVM has filled in this variant, as it was asked to, and any bit pattern is a valid value of it.
    let ioapic = unsafe { chip.chip.ioapic };
    // SAFETY: the entry as one number: any bit pattern is a valid value of it.
    let masked = |entry: &kvm_ioapic_state__bindgen_ty_1| unsafe { entry.bits } & REDIRECTION_MASKED != 0;
    Ok(ioapic.redirtbl.get(line as usize).is_some_and(|entry| !masked(entry)))
}

/// KVM's words about the internal error (KVM_EXIT_INTERNAL_ERROR) that ended the last KVM_RUN.
pub(crate) fn internal_error_text(vcpu: &mut VcpuFd) -> String {
    // SAFETY: any bit pattern is a valid value of this variant, which holds integers only.
    let error = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let what = match error.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "an instruction that it cannot emulate",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event that could not be delivered",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an unexpected exit",
        _ => "an internal error",
    };
    let count = (error.ndata as usize).min(error.data.len());
    format!("KVM gave up on {what} (suberror {}, data {:x?})", error.suberror, &error.data[..count])
}

fn check(result: i32) -> Result<(), Error> {
    if result < 0 { Err(Error::last()) } else { Ok(()) }
}
