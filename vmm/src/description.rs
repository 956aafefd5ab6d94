//! What a machine says of itself to a destination beyond its shape: the part that only this VMM understands.

use godwit_core::codec;
use godwit_core::machine::MachineDescription;
use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;
use crate::cpuid::Leaf;
use crate::devices::layout::DeviceLayout;
use crate::devices::virtio::net::tap::is_interface_name;
use crate::error::VmmError;
use crate::memory::layout;
use crate::preflight::net::TapPort;
use crate::state::{self, Counts};
use crate::vcpu::msr::MAX_MSRS;
use crate::vcpu::state::StateShape;

/// Version of the layout of [`Body`].
const VERSION: u16 = 2;

/// What a guest has been shown of its CPUs and devices, and what their state is made of. It stays the same as long as the guest runs,
/// on whatever host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// CPUID of each vCPU.
    pub(crate) cpuid: Vec<Vec<Leaf>>,
    /// What a vCPU's state is made of.
    pub(crate) shape: StateShape,
    /// Frequency of the guest's TSCs.
    pub(crate) tsc_khz: u32,
    /// Where its devices are.
    pub(crate) layout: DeviceLayout,
}

impl Identity {
    /// How many parts the machine has.
    pub(crate) fn counts(&self) -> Counts {
        Counts { vcpus: self.cpuid.len() as u32, virtio_devices: self.layout.virtio.len() }
    }
}

/// The version comes first, so that a body of any version can be told apart.
#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u16,
    body: Vec<u8>,
}

/// Version 2.
#[derive(Serialize, Deserialize)]
struct Body {
    /// The machine's definition, as TOML: it has its own way of telling what is unknown.
    definition: String,
    cpuid: Vec<Vec<Leaf>>,
    msrs: Vec<u32>,
    xsave_bytes: u32,
    tsc_khz: u32,
    layout: DeviceLayout,
    accepted_features: Vec<u64>,
    taps: Vec<TapPort>,
}

/// Describes a machine whose virtio drivers have accepted these features, by place, and whose taps are connected like this, by
/// interface.
pub(crate) fn describe(
    config: &MachineConfig,
    identity: &Identity,
    accepted_features: Vec<u64>,
    taps: Vec<TapPort>,
) -> Result<MachineDescription, VmmError> {
    let failed = |source| VmmError::Codec { what: "cannot describe the machine", source };
    let body = Body {
        definition: config.to_toml()?,
        cpuid: identity.cpuid.clone(),
        msrs: identity.shape.msrs.clone(),
        xsave_bytes: u32::try_from(identity.shape.xsave_bytes).unwrap_or(u32::MAX),
        tsc_khz: identity.tsc_khz,
        layout: identity.layout.clone(),
        accepted_features,
        taps,
    };
    let body = codec::encode(&body).map_err(failed)?;
    Ok(MachineDescription {
        name: config.name.clone(),
        vcpus: config.vcpus,
        memory: layout(config.memory.bytes()),
        sections: state::sections(identity.counts()),
        vmm: codec::encode(&Envelope { version: VERSION, body }).map_err(failed)?,
    })
}

/// A description that has been read and makes sense in itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Described {
    /// The machine's definition.
    pub(crate) config: MachineConfig,
    /// What its guest has been shown.
    pub(crate) identity: Identity,
    /// The features that its virtio drivers have accepted so far, by place.
    pub(crate) accepted_features: Vec<u64>,
    /// What its taps are connected to, by interface.
    pub(crate) taps: Vec<TapPort>,
}

impl Described {
    /// Reads a description. The error is for the person who wanted to move the machine.
    pub(crate) fn read(description: &MachineDescription) -> Result<Self, String> {
        let envelope: Envelope = codec::decode(&description.vmm)
            .map_err(|error| format!("cannot read the machine's description: {error}"))?;
        if envelope.version != VERSION {
            return Err(format!(
                "the machine's description has version {}, this version reads {VERSION}",
                envelope.version
            ));
        }
        let body: Body =
            codec::decode(&envelope.body).map_err(|error| format!("cannot read the machine's description: {error}"))?;
        let config = MachineConfig::from_toml(&body.definition, "sent by the source")
            .and_then(|config| config.validate().map(|()| config))
            .map_err(|error| error.to_string())?;
        if (config.vcpus, layout(config.memory.bytes())) != (description.vcpus, description.memory.clone()) {
            return Err("the machine's definition and its shape contradict each other".into());
        }
        if body.cpuid.len() != config.vcpus as usize {
            return Err(format!("{} CPUID tables for {} vCPUs", body.cpuid.len(), config.vcpus));
        }
        if body.msrs.len() > MAX_MSRS {
            return Err(format!("{} MSRs are more than any CPU has", body.msrs.len()));
        }
        body.layout
            .check(config.virtio_devices())
            .map_err(|reason| format!("the machine's devices cannot be where they are said to be: {reason}"))?;
        if body.accepted_features.len() != body.layout.virtio.len() {
            return Err(format!("features of {} virtio drivers", body.accepted_features.len()));
        }
        if body.taps.len() != config.nets.len() {
            return Err(format!("{} taps of {} network interfaces", body.taps.len(), config.nets.len()));
        }
        let bridges = body.taps.iter().filter_map(|tap| tap.bridge.as_deref());
        if bridges.into_iter().any(|name| !is_interface_name(name)) {
            return Err("a tap is in a bridge whose name cannot be one".into());
        }
        let shape = StateShape { msrs: body.msrs, xsave_bytes: body.xsave_bytes as usize };
        Ok(Self {
            config,
            identity: Identity { cpuid: body.cpuid, shape, tsc_khz: body.tsc_khz, layout: body.layout },
            accepted_features: body.accepted_features,
            taps: body.taps,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::GuestKind;

    fn described() -> Described {
        let config = MachineConfig { guest: Some(GuestKind::Writer), vcpus: 2, ..Default::default() };
        let shape = StateShape { msrs: vec![0x174, 0x6e0], xsave_bytes: 4096 };
        Described {
            config,
            identity: Identity { cpuid: vec![Vec::new(); 2], shape, tsc_khz: 2_000_000, layout: DeviceLayout::new(1) },
            accepted_features: vec![1 << 32],
            taps: Vec::new(),
        }
    }

    fn description() -> MachineDescription {
        let described = described();
        describe(&described.config, &described.identity, described.accepted_features, described.taps).unwrap()
    }

    #[test]
    fn a_description_reads_back() {
        assert_eq!(Described::read(&description()), Ok(described()));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut description = description();
        description.vmm = codec::encode(&Envelope { version: 7, body: vec![1, 2, 3] }).unwrap();
        assert!(Described::read(&description).unwrap_err().contains("has version 7, this version reads 2"));
    }

    #[test]
    fn a_shape_that_contradicts_the_definition_is_refused() {
        let mut description = description();
        description.vcpus = 3;
        assert!(Described::read(&description).unwrap_err().contains("contradict"));
    }

    proptest! {
        #[test]
        fn damaged_descriptions_are_read_or_refused(position: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut description = description();
            let position = position.index(description.vmm.len());
            description.vmm[position] = byte;
            let _ = Described::read(&description);
            description.vmm.truncate(cut.index(description.vmm.len()));
            prop_assert!(Described::read(&description).is_err());
        }
    }
}
