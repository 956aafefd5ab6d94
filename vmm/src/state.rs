//! A machine's saved state as sections: their kinds and versions, encoding and decoding.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use godwit_core::Section;
use godwit_core::codec;
use godwit_core::machine::SectionVersion;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chips::{self, IrqchipState, PitState};
use crate::clock::{self, ClockState};
use crate::devices::acpi::power;
use crate::devices::virtio::mmio::{self, VirtioState};
use crate::devices::{DevicesState, is_virtio_kind, serial, virtio_kind};
use crate::error::VmmError;
use crate::vcpu::state::{self as vcpu_state, StateShape, VcpuState};

const IRQCHIP: &str = "irqchip";
const PIT: &str = "pit";
const CLOCK: &str = "clock";
const SERIAL: &str = "serial";
const POWER: &str = "ged";

/// All state of a machine but its memory.
pub(crate) struct MachineState {
    /// By vCPU number.
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) irqchip: IrqchipState,
    pub(crate) pit: PitState,
    pub(crate) clock: ClockState,
    pub(crate) devices: DevicesState,
}

/// How many of what a machine has more than one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) vcpus: u32,
    pub(crate) virtio_devices: usize,
}

/// The sections of a machine with so many parts, as this version writes and reads them.
pub(crate) fn sections(counts: Counts) -> Vec<SectionVersion> {
    let chips = [
        (IRQCHIP, chips::IRQCHIP_VERSION),
        (PIT, chips::PIT_VERSION),
        (CLOCK, clock::VERSION),
        (SERIAL, serial::VERSION),
        (POWER, power::VERSION),
    ];
    let vcpus = (0..counts.vcpus).map(|id| SectionVersion { kind: vcpu_kind(id), version: vcpu_state::VERSION });
    let chips = chips.map(|(kind, version)| SectionVersion { kind: kind.into(), version });
    let virtio =
        (0..counts.virtio_devices).map(|slot| SectionVersion { kind: virtio_kind(slot), version: mmio::VERSION });
    vcpus.chain(chips).chain(virtio).collect()
}

/// The versions of a section that this version reads: the one that it writes, and what it has brought up to date before.
fn readable(known: &SectionVersion) -> RangeInclusive<u16> {
    let oldest = if is_virtio_kind(&known.kind) { mmio::OLDEST_VERSION } else { known.version };
    oldest..=known.version
}

/// Every reason why sections of these kinds and versions cannot make up a machine with so many parts.
pub(crate) fn unusable(offered: &[SectionVersion], counts: Counts) -> Vec<String> {
    let known = sections(counts);
    let unknown = offered.iter().filter_map(|section| match known.iter().find(|known| known.kind == section.kind) {
        None => Some(format!("this version knows no section {:?}", printable(&section.kind))),
        Some(known) if !readable(known).contains(&section.version) => {
            let (oldest, newest) = readable(known).into_inner();
            let readable = if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") };
            let (kind, version) = (&known.kind, section.version);
            Some(format!("section {kind} has version {version}, this version reads {readable}"))
        }
        Some(_) if offered.iter().filter(|other| other.kind == section.kind).count() > 1 => {
            Some(format!("section {} occurs more than once", section.kind))
        }
        Some(_) => None,
    });
    let absent = known
        .iter()
        .filter(|known| offered.iter().all(|section| section.kind != known.kind))
        .map(|known| format!("section {} is missing", known.kind));
    unknown.chain(absent).collect()
}

impl MachineState {
    /// As sections.
    pub(crate) fn encode(&self) -> Result<Vec<Section>, VmmError> {
        let mut sections = Vec::with_capacity(self.vcpus.len() + self.devices.virtio.len() + 5);
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            sections.push(section(vcpu_kind(id), vcpu_state::VERSION, vcpu)?);
        }
        sections.push(section(IRQCHIP.into(), chips::IRQCHIP_VERSION, &self.irqchip)?);
        sections.push(section(PIT.into(), chips::PIT_VERSION, &self.pit)?);
        sections.push(section(CLOCK.into(), clock::VERSION, &self.clock)?);
        sections.push(section(SERIAL.into(), serial::VERSION, &self.devices.serial)?);
        sections.push(section(POWER.into(), power::VERSION, &self.devices.power)?);
        for (slot, device) in self.devices.virtio.iter().enumerate() {
            sections.push(section(virtio_kind(slot), mmio::VERSION, device)?);
        }
        Ok(sections)
    }

    /// From sections: all of them, each once, each of a version that is known, each checked as far as KVM does not.
    pub(crate) fn decode(
        sections: &[Section],
        counts: Counts,
        shape: &StateShape,
        tsc_khz: u32,
    ) -> Result<Self, VmmError> {
        let versions: Vec<_> = sections
            .iter()
            .map(|section| SectionVersion { kind: section.kind.clone(), version: section.version })
            .collect();
        if let Some(reason) = unusable(&versions, counts).into_iter().next() {
            return Err(VmmError::Status(format!("the state cannot be loaded: {reason}")));
        }
        let by_kind: BTreeMap<_, _> = sections.iter().map(|section| (section.kind.as_str(), section)).collect();
        let state = Self {
            vcpus: (0..counts.vcpus).map(|id| value(&by_kind, &vcpu_kind(id))).collect::<Result<_, _>>()?,
            irqchip: value(&by_kind, IRQCHIP)?,
            pit: value(&by_kind, PIT)?,
            clock: value(&by_kind, CLOCK)?,
            devices: DevicesState {
                serial: value(&by_kind, SERIAL)?,
                power: value(&by_kind, POWER)?,
                virtio: (0..counts.virtio_devices).map(|slot| virtio(&by_kind, slot)).collect::<Result<_, _>>()?,
            },
        };
        for (id, vcpu) in (0..).zip(&state.vcpus) {
            vcpu.check(shape).map_err(|reason| VmmError::state(vcpu_kind(id), reason))?;
        }
        state.irqchip.check().map_err(|reason| VmmError::state(IRQCHIP, reason))?;
        state.clock.check(state.vcpus.len(), tsc_khz).map_err(|reason| VmmError::state(CLOCK, reason))?;
        Ok(state)
    }
}

/// Text from a peer, fit to be shown.
fn printable(text: &str) -> String {
    text.chars().take(64).filter(|c| !c.is_control()).collect()
}

fn vcpu_kind(id: u32) -> String {
    format!("vcpu/{id}")
}

fn section(kind: String, version: u16, state: &impl Serialize) -> Result<Section, VmmError> {
    let payload =
        codec::encode(state).map_err(|source| VmmError::Codec { what: "cannot encode the machine's state", source })?;
    Ok(Section { kind, version, payload })
}

fn find<'a>(by_kind: &BTreeMap<&str, &'a Section>, kind: &str) -> Result<&'a Section, VmmError> {
    by_kind.get(kind).copied().ok_or_else(|| VmmError::state(kind, "it is missing"))
}

fn value<T: DeserializeOwned>(by_kind: &BTreeMap<&str, &Section>, kind: &str) -> Result<T, VmmError> {
    codec::decode(&find(by_kind, kind)?.payload).map_err(|error| VmmError::state(kind, error.to_string()))
}

fn virtio(by_kind: &BTreeMap<&str, &Section>, slot: usize) -> Result<VirtioState, VmmError> {
    let kind = virtio_kind(slot);
    let section = find(by_kind, &kind)?;
    VirtioState::decode(section.version, &section.payload).map_err(|error| VmmError::state(kind, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: Counts = Counts { vcpus: 2, virtio_devices: 3 };

    #[test]
    fn what_is_written_can_be_read() {
        assert_eq!(unusable(&sections(COUNTS), COUNTS), Vec::<String>::new());
    }

    #[test]
    fn every_reason_is_given() {
        let mut offered = sections(COUNTS);
        offered[0].version = 9;
        offered[1].kind = "tpm\u{1b}[2J".into();
        offered.push(offered[2].clone());
        let mut virtio = offered.iter_mut().filter(|section| section.kind.starts_with("virtio"));
        virtio.next().unwrap().version = 1;
        virtio.next().unwrap().version = 3;
        let reasons = unusable(&offered, COUNTS);
        assert!(reasons.iter().any(|r| r == "section vcpu/0 has version 9, this version reads 1"), "{reasons:?}");
        assert!(reasons.iter().any(|r| r == "this version knows no section \"tpm[2J\""), "{reasons:?}");
        assert!(reasons.iter().any(|r| r == "section vcpu/1 is missing"), "{reasons:?}");
        assert!(reasons.iter().any(|r| r.contains("more than once")), "{reasons:?}");
        assert!(
            reasons.iter().any(|r| r == "section virtio/1 has version 3, this version reads 1 to 2"),
            "{reasons:?}"
        );
        assert!(!reasons.iter().any(|r| r.contains("virtio/0")), "an older version is read: {reasons:?}");
    }
}
