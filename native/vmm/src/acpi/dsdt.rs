// SPDX-License-Identifier: Apache-2.0
//! The DSDT: what cannot be found by looking, in AML.
//!
//! The host bridge with its windows, its interrupt pins and its root ports (for their slot numbers); the serial
//! port and the clock on the LPC bridge; the ranges that are nobody else's; the processors; S5. The power
//! button is fixed hardware and needs no object.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, IO, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::Aml;

use super::{OEM, OEM_TABLE, REVISION};
use crate::layout;
use crate::legacy::pm::SLP_TYP_S5;
use crate::pci::{Place, ROOT_PORTS};

/// \_OSC for PCI host bridges (PCI Firmware Specification 3.3, 4.5.1).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the system may control itself: hotplug, PME, the capability structure. There is no SHPC and no AER.
const OSC_GRANTED: u32 = 1 | 1 << 2 | 1 << 4;
/// Answer: the UUID is not known.
const OSC_UNKNOWN: u32 = 1 << 2;
/// Answer: not everything was granted.
const OSC_MASKED: u32 = 1 << 4;
/// The first of eight lines that PCI pins share.
const PCI_LINES: u32 = 16;

/// The table for a machine of `vcpus` vCPUs.
pub(super) fn table(vcpus: u8) -> Vec<u8> {
    let mut aml = Vec::new();
    Scope::new(
        "\\_SB_".into(),
        vec![&HostBridge, &Motherboard, &Processors(vcpus)],
    )
    .to_aml_bytes(&mut aml);
    Name::new(
        "\\_S5_".into(),
        &Package::new(vec![&SLP_TYP_S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

fn named(name: &str) -> Path {
    Path::new(name)
}

fn address(place: Place) -> u32 {
    u32::from(place.device) << 16 | u32::from(place.function)
}

fn hid(name: &str) -> Name {
    Name::new(named("_HID"), &EISAName::new(name))
}

/// AML that is finished: what it was made of may go.
struct Finished(Vec<u8>);

impl Aml for Finished {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn finished(aml: &dyn Aml) -> Finished {
    Finished(super::bytes(aml))
}

fn resources(list: Vec<&dyn Aml>) -> Finished {
    finished(&Name::new(named("_CRS"), &ResourceTemplate::new(list)))
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Finished {
    finished(&Device::new(named(name), children))
}

struct HostBridge;

impl Aml for HostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let mmio32_last = layout::MMIO32_START.saturating_add(layout::MMIO32_SIZE - 1);
        let mmio64_last = layout::MMIO64_START.saturating_add(layout::MMIO64_SIZE - 1);
        let windows = resources(vec![
            &AddressSpace::new_bus_number(0u16, 255),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::new_io(0u16, 0x0cf7, None),
            &AddressSpace::new_io(0x0d00u16, 0xffff, None),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                layout::MMIO32_START as u32,
                mmio32_last as u32,
                None,
            ),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::Cacheable,
                true,
                layout::MMIO64_START,
                mmio64_last,
                None,
            ),
        ]);
        let compatible = Name::new(named("_CID"), &EISAName::new("PNP0A03"));
        let (segment, bus, unique) = (
            Name::new(named("_SEG"), &ZERO),
            Name::new(named("_BBN"), &ZERO),
            Name::new(named("_UID"), &ZERO),
        );
        device(
            "PCI0",
            vec![
                &hid("PNP0A08"),
                &compatible,
                &segment,
                &bus,
                &unique,
                &windows,
                &InterruptPins,
                &Control,
                &RootPorts,
                &LpcBridge,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Where INTA to INTD of each device on bus 0 come in. No device here uses them, one that is passed through may.
struct InterruptPins;

impl Aml for InterruptPins {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let mut routes = PackageBuilder::new();
        for device in 0..32u32 {
            for pin in 0..4u32 {
                let line = PCI_LINES.saturating_add((device.saturating_add(pin)) % 8);
                let any_function = device << 16 | 0xffff;
                routes.add_element(&Package::new(vec![&any_function, &pin, &ZERO, &line]));
            }
        }
        Name::new(named("_PRT"), &routes).to_aml_bytes(sink);
    }
}

/// _OSC: PCI Express hotplug is the system's own, without ACPI in between.
struct Control;

impl Aml for Control {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (status, wanted) = (named("CDW1"), named("CDW3"));
        Method::new(
            named("_OSC"),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&wanted, &Arg(3), &8u8),
                        &And::new(&Local(0), &wanted, &OSC_GRANTED),
                        &If::new(
                            &NotEqual::new(&Local(0), &wanted),
                            vec![&Or::new(&status, &status, &OSC_MASKED)],
                        ),
                        &Store::new(&wanted, &Local(0)),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct RootPorts;

impl Aml for RootPorts {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for index in 0..ROOT_PORTS {
            let place = Name::new(named("_ADR"), &address(Place::root_port(index)));
            let slot = Name::new(named("_SUN"), &index.saturating_add(1));
            device(&format!("RP{index:02}"), vec![&place, &slot]).to_aml_bytes(sink);
        }
    }
}

struct LpcBridge;

impl Aml for LpcBridge {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let place = Name::new(named("_ADR"), &address(Place::LPC));
        let com1 = layout::COM1 as u16;
        let serial = resources(vec![
            &IO::new(com1, com1, 1, 8),
            &Interrupt::new(true, true, false, false, layout::COM1_IRQ),
        ]);
        let number = Name::new(named("_UID"), &1u8);
        let serial = device("COM1", vec![&hid("PNP0501"), &number, &serial]);
        let cmos = layout::CMOS as u16;
        let clock = resources(vec![
            &IO::new(cmos, cmos, 1, 2),
            &Interrupt::new(true, true, false, false, layout::RTC_IRQ),
        ]);
        let clock = device("RTC_", vec![&hid("PNP0B00"), &clock]);
        device("LPC_", vec![&place, &serial, &clock]).to_aml_bytes(sink);
    }
}

/// Ranges that no other device has: ECAM (Linux uses it only when it is reserved here), the power management block.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let pm = layout::PM_BASE as u16;
        let ranges = resources(vec![
            &Memory32Fixed::new(true, layout::ECAM_START as u32, layout::ECAM_SIZE as u32),
            &IO::new(pm, pm, 1, layout::PM_SIZE as u8),
        ]);
        device("MBRD", vec![&hid("PNP0C02"), &ranges]).to_aml_bytes(sink);
    }
}

struct Processors(u8);

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        for id in 0..self.0 {
            let kind = Name::new(named("_HID"), &"ACPI0007");
            let unique = Name::new(named("_UID"), &id);
            device(&format!("CP{id:02X}"), vec![&kind, &unique]).to_aml_bytes(sink);
        }
    }
}
