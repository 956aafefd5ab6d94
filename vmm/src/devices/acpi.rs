//! ACPI: the tables by which a stock kernel finds CPUs and devices, and the few registers behind them.
//!
//! Hardware-reduced: there is no ACPI controller of the old kind, only a port each to sleep and to reset, and an event device
//! that tells of the power button.

mod dsdt;
pub(crate) mod power;
mod tables;

pub(crate) use tables::image;
