//! The DSDT: the devices that a kernel cannot find by itself, and how the machine is switched off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt,
    Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
    ZERO,
};

use super::power;
use crate::devices::layout::{COM1, DeviceLayout, POWER_PORTS, VirtioPlace, WINDOW_BYTES};

/// What a button's device is told when it was pressed.
const BUTTON_PRESSED: u8 = 0x80;

/// Everything after the table's header.
pub(super) fn body(layout: &DeviceLayout) -> Vec<u8> {
    let mut bytes = Vec::new();
    soft_off(&mut bytes);
    serial_port(&mut bytes);
    for (unit, place) in layout.virtio.iter().enumerate() {
        virtio_device(unit, place, &mut bytes);
    }
    power_button(&mut bytes);
    event_device(layout, &mut bytes);
    bytes
}

/// `_S5`: what to write to the sleep control register to be switched off.
fn soft_off(bytes: &mut Vec<u8>) {
    let zero = ZERO;
    let sleep_type = power::S5_TYPE;
    let package = Package::new(vec![&sleep_type, &sleep_type, &zero, &zero]);
    Name::new(path("_S5_"), &package).to_aml_bytes(bytes);
}

fn serial_port(bytes: &mut Vec<u8>) {
    let (port, ports, line) = COM1;
    let ports = IO::new(port, port, 1, ports as u8);
    device("COM1", &EISAName::new("PNP0501"), 0, &[&ports, &edge(line)], &[], bytes);
}

fn virtio_device(unit: usize, place: &VirtioPlace, bytes: &mut Vec<u8>) {
    // In the 32-bit gap: `DeviceLayout::check`.
    let window = Memory32Fixed::new(true, place.address as u32, WINDOW_BYTES as u32);
    let name = format!("VR{unit:02}");
    device(&name, &"LNRO0005", unit, &[&window, &edge(place.line)], &[], bytes);
}

fn power_button(bytes: &mut Vec<u8>) {
    device("PWRB", &EISAName::new("PNP0C0C"), 0, &[], &[], bytes);
}

/// The generic event device: on its interrupt the kernel calls `_EVT`, which asks what has happened.
fn event_device(layout: &DeviceLayout, bytes: &mut Vec<u8>) {
    let region = OpRegion::new(path("PREG"), OpRegionSpace::SystemIO, &layout.power_port, &POWER_PORTS);
    let events = Field::new(
        path("PREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Reserved(usize::from(power::EVENTS) * 8), FieldEntry::Named(*b"EVTS", 8)],
    );
    // Reading takes the events away: once, into a local.
    let (happened, read) = (Local(0), path("EVTS"));
    let take = Store::new(&happened, &read);
    let (button, zero) = (power::POWER_BUTTON, ZERO);
    let pressed = And::new(&zero, &happened, &button);
    let target = path("\\_SB_.PWRB");
    let tell = Notify::new(&target, &BUTTON_PRESSED);
    let if_pressed = If::new(&pressed, vec![&tell]);
    let event = Method::new(path("_EVT"), 1, true, vec![&take, &if_pressed]);
    device("GED_", &"ACPI0013", 0, &[&edge(layout.event_line)], &[&region, &events, &event], bytes);
}

/// A device below `\_SB`, with what the kernel recognises it by, its resources, and what else belongs to it.
fn device(
    name: &str,
    hardware_id: &dyn Aml,
    unit: usize,
    resources: &[&dyn Aml],
    more: &[&dyn Aml],
    bytes: &mut Vec<u8>,
) {
    let hardware_id = Name::new(path("_HID"), hardware_id);
    let unit = Name::new(path("_UID"), &unit);
    let template = ResourceTemplate::new(resources.to_vec());
    let resource_settings = Name::new(path("_CRS"), &template);
    let mut children: Vec<&dyn Aml> = vec![&hardware_id, &unit];
    if !resources.is_empty() {
        children.push(&resource_settings);
    }
    children.extend(more);
    let device = Device::new(path(name), children);
    Scope::new(path("\\_SB_"), vec![&device]).to_aml_bytes(bytes);
}

/// An interrupt line of one device, raised as an edge.
fn edge(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn path(name: &str) -> Path {
    Path::new(name)
}
