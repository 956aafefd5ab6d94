//! The tables of fixed layout: RSDP, XSDT, FADT and MADT.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{dsdt, power};
use crate::devices::layout::{DeviceLayout, IO_APIC, LOCAL_APIC};

const OEM_ID: [u8; 6] = *b"GODWIT";
const OEM_TABLE_ID: [u8; 8] = *b"GODWITVM";
const OEM_REVISION: u32 = 1;

/// The revision of the DSDT that makes integers 64 bits wide.
const DSDT_REVISION: u8 = 2;

/// Bytes in the header that every table but the RSDP has.
const HEADER_BYTES: u32 = 36;

/// What tables are aligned to.
const ALIGNMENT: usize = 16;

/// In the FADT's boot flags: neither VGA nor a real-time clock is there. That the bit for a keyboard controller is clear says
/// that none is.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// All tables of a machine, for guest memory from `base` on. The RSDP is the first thing in it.
pub(crate) fn image(base: u32, vcpus: u32, layout: &DeviceLayout) -> Vec<u8> {
    let mut image = Image { base, bytes: vec![0; Rsdp::len()] };
    let dsdt = image.append(&dsdt(layout));
    let fadt = image.append(&fadt(dsdt, layout.power_port));
    let madt = image.append(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt] {
        xsdt.add_entry(u64::from(table));
    }
    let xsdt = image.append(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, u64::from(xsdt)));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

/// Tables one after the other.
struct Image {
    base: u32,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and says where it lies.
    fn append(&mut self, table: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let address = self.base + self.bytes.len() as u32;
        self.bytes.extend(table);
        address
    }
}

fn dsdt(layout: &DeviceLayout) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&dsdt::body(layout));
    table.as_slice().to_vec()
}

fn fadt(dsdt: u32, power_port: u16) -> Vec<u8> {
    let register = |offset: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(power_port) + u64::from(offset))
    };
    // A power button of the fixed kind is what hardware-reduced machines do not have, and the flag says so.
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(u64::from(dsdt))
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless);
    table.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    table.reset_reg = register(power::RESET);
    table.reset_value = power::RESET_VALUE;
    table.sleep_control_reg = register(power::SLEEP_CONTROL);
    table.sleep_status_reg = register(power::SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"GODWIT\0\0").into();
    bytes(&table.finalize())
}

/// The MADT. Its flags are zero: there are no PICs that the guest would have to switch off.
fn madt(vcpus: u32) -> Vec<u8> {
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    // The LAPIC id is the vCPU's number; both fit into a byte (config::MAX_VCPUS).
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes(&table)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::config::MAX_VCPUS;
    use crate::devices::layout::MAX_VIRTIO_DEVICES;

    const BASE: u32 = 0xe_0000;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The table that lies at `address`, as a guest finds it: by its own length, with a sum of zero.
    fn table(image: &[u8], address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let at = (address - u64::from(BASE)) as usize;
        let table = image[at..at + word(image, at + 4) as usize].to_vec();
        assert_eq!(&table[..4], signature);
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{signature:?}");
        table
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_guest_finds_every_table() {
        let image = image(BASE, 3, &DeviceLayout::new(2));
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(image[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(image[..36].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = table(&image, long(&image, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&image, long(&xsdt, 36), b"FACP");
        let madt = table(&image, long(&xsdt, 44), b"APIC");
        let dsdt = table(&image, long(&fadt, 140), b"DSDT");
        assert!(dsdt.len() > 36);

        assert_eq!(
            word(&fadt, 112) & (1 << 20 | 1 << 10 | 1 << 4),
            1 << 20 | 1 << 10 | 1 << 4,
            "reduced, reset, button"
        );
        // Reset register and value, sleep control, sleep status: byte-wide ports.
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!((long(&fadt, 120), fadt[128]), (0x602, 1));
        assert_eq!((long(&fadt, 248), long(&fadt, 260)), (0x600, 0x601));

        assert_eq!(word(&madt, 40), 0, "no PICs");
        let cpus: Vec<_> = madt[44..44 + 3 * 8].chunks(8).map(|cpu| (cpu[0], cpu[2], cpu[3], cpu[4])).collect();
        assert_eq!(cpus, [(0, 0, 0, 1), (0, 1, 1, 1), (0, 2, 2, 1)]);
        assert_eq!((madt[68], word(&madt, 72), word(&madt, 76)), (1, 0xfec0_0000, 0));
    }

    /// ACPICA's own disassembler and compiler (acpica-tools) read the tables.
    #[test]
    fn acpicas_compiler_has_nothing_to_object_to() {
        let folder = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| {
            let output = Command::new("iasl").args(arguments).current_dir(folder.path()).output();
            let output = output.expect("iasl is missing: `cargo xtask deps --install` installs it");
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "iasl {arguments:?}: {text}");
            text
        };
        fs::write(folder.path().join("dsdt.aml"), dsdt(&DeviceLayout::new(MAX_VIRTIO_DEVICES))).unwrap();
        let image = image(BASE, 2, &DeviceLayout::new(1));
        let xsdt = table(&image, long(&image, 24), b"XSDT");
        fs::write(folder.path().join("fadt.aml"), table(&image, long(&xsdt, 36), b"FACP")).unwrap();
        fs::write(folder.path().join("madt.aml"), table(&image, long(&xsdt, 44), b"APIC")).unwrap();
        for name in ["dsdt", "fadt", "madt"] {
            run(&["-d", &format!("{name}.aml")]);
            let source = fs::read_to_string(folder.path().join(format!("{name}.dsl"))).unwrap();
            assert!(!source.contains("Invalid") && !source.contains("Unknown"), "{source}");
        }
        let remarks = run(&["-p", "again", "dsdt.dsl"]);
        assert!(remarks.contains("0 Errors, 0 Warnings"), "{remarks}");
        let source = fs::read_to_string(folder.path().join("dsdt.dsl")).unwrap();
        for expected in ["LNRO0005", "0xD0000000", "ACPI0013", "Notify (\\_SB.PWRB, 0x80)", "_S5"] {
            assert!(source.contains(expected), "{expected} in {source}");
        }
    }

    #[test]
    fn the_largest_machine_has_room() {
        let image = image(BASE, MAX_VCPUS, &DeviceLayout::new(MAX_VIRTIO_DEVICES));
        assert!(image.len() < 0x10_0000 - BASE as usize, "{} bytes", image.len());
    }
}
