// SPDX-License-Identifier: Apache-2.0
//! The DSDT: what cannot be found by looking, in AML.
//!
//! The host bridge with its windows, its interrupt pins and its root ports (for their slot numbers); the serial
//! port and the clock on the LPC bridge; the ranges that are nobody else's; the processors; S5; the devices that only
//! virtual machines have: pvpanic, fw_cfg (by the names that QEMU gave them, which drivers look for) and the generation
//! ID, whose change GPE 5 announces. The power button is fixed hardware and needs no object.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    If, Index, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Notify, Or, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Store, Uuid, IO, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::Aml;

use super::{View, GENERATION_OFFSET, OEM, OEM_TABLE, REVISION};
use crate::layout;
use crate::legacy::pm::SLP_TYP_S5;
use crate::pci::root::Taken;
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

/// The name of the generation ID's address, and what stands before its four bytes: NameOp, the name, DWordPrefix.
const GENERATION_NAME: &[u8; 6] = b"\x08VGIA\x0c";

/// The table for a machine. Every number in it that depends on where PCI's memory lies has a fixed length.
pub(super) fn table(view: &View) -> Vec<u8> {
    let mut aml = Vec::new();
    Scope::new(
        "\\_SB_".into(),
        vec![
            &HostBridge(view.pci),
            &Motherboard(view.pci.ecam),
            &Processors(view.vcpus),
            &Panic,
            &FirmwareConfiguration,
            &Generation,
        ],
    )
    .to_aml_bytes(&mut aml);
    Scope::new(
        "\\_GPE".into(),
        vec![&Method::new(
            named("_E05"),
            0,
            false,
            vec![&Notify::new(&named("\\_SB_.VGEN"), &0x80u8)],
        )],
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

/// The 32-bit windows, below and above the ECAM if it lies between low RAM and the I/O APIC, each from its first to its
/// last address. Two in any case; they do not meet.
fn windows32(ecam: Option<(u64, u64)>) -> [(u32, u32); 2] {
    let (start, end) = (layout::PCI32_START, layout::PCI32_END);
    let (from, to) = match ecam {
        // Something is left on both sides.
        Some((base, size)) if base > start && base.saturating_add(size) < end => {
            (base, base.saturating_add(size))
        }
        Some((base, size)) if base == start && base.saturating_add(size) < end => {
            let to = base.saturating_add(size);
            let middle = to.midpoint(end);
            return [
                (to as u32, middle.saturating_sub(1) as u32),
                (middle as u32, end.saturating_sub(1) as u32),
            ];
        }
        _ => (layout::MMIO32_START, layout::MMIO32_START),
    };
    [
        (start as u32, from.saturating_sub(1) as u32),
        (to as u32, end.saturating_sub(1) as u32),
    ]
}

/// The 64-bit window: that of the layout, unless firmware has put something elsewhere; then from there, in GiB.
fn window64(high: Option<(u64, u64)>) -> (u64, u64) {
    const GIB: u64 = 1 << 30;
    let end = layout::MMIO64_START.saturating_add(layout::MMIO64_SIZE);
    match high {
        Some((from, to)) if from < layout::MMIO64_START || to > end => {
            let last = to.saturating_sub(1) | (GIB - 1);
            (from & !(GIB - 1), last)
        }
        _ => (layout::MMIO64_START, end.saturating_sub(1)),
    }
}

struct HostBridge(Taken);

impl Aml for HostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let [below, above] = windows32(self.0.ecam);
        let (mmio64_first, mmio64_last) = window64(self.0.high);
        let windows = resources(vec![
            &AddressSpace::new_bus_number(0u16, 255),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::new_io(0u16, 0x0cf7, None),
            &AddressSpace::new_io(0x0d00u16, 0xffff, None),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                below.0,
                below.1,
                None,
            ),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                above.0,
                above.1,
                None,
            ),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::Cacheable,
                true,
                mmio64_first,
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
struct Motherboard(Option<(u64, u64)>);

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let pm = layout::PM_BASE as u16;
        // An ECAM above 4 GiB is left out: firmware here puts it below.
        let (base, size) = self.0.unwrap_or_default();
        let (base, size) = (u32::try_from(base), u32::try_from(size));
        let (base, size) = (base.unwrap_or(0), size.unwrap_or(0));
        let ranges = resources(vec![
            &Memory32Fixed::new(true, base, size),
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

/// What a panicking guest writes to.
struct Panic;

impl Aml for Panic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        ports("PEVT", "QEMU0001", layout::PVPANIC, 1, sink);
    }
}

/// The firmware configuration device, which Linux shows in /sys/firmware/qemu_fw_cfg.
struct FirmwareConfiguration;

impl Aml for FirmwareConfiguration {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        ports(
            "FWCF",
            "QEMU0002",
            layout::FW_CFG,
            layout::FW_CFG_SIZE as u8,
            sink,
        );
    }
}

/// A device of a virtual machine: present, not shown, with a few ports.
fn ports(name: &str, id: &'static str, first: u64, count: u8, sink: &mut dyn acpi_tables::AmlSink) {
    let kind = Name::new(named("_HID"), &id);
    let present = Name::new(named("_STA"), &0x0bu8);
    let first = first as u16;
    let range = resources(vec![&IO::new(first, first, 1, count)]);
    device(name, vec![&kind, &present, &range]).to_aml_bytes(sink);
}

/// The generation ID: its address is that of VGIA, which whoever places the tables fills in.
struct Generation;

impl Aml for Generation {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let id = Name::new(named("_HID"), &"VMBS0001");
        let compatible = Name::new(named("_CID"), &"VM_Gen_Counter");
        let description = Name::new(named("_DDN"), &"VM_Gen_Counter");
        let mut bytes = GENERATION_NAME.to_vec();
        bytes.extend_from_slice(&(GENERATION_OFFSET as u32).to_le_bytes());
        let address = finished(&Method::new(
            named("ADDR"),
            0,
            false,
            vec![
                &Store::new(&Local(0), &Package::new(vec![&ZERO, &ZERO])),
                &Store::new(&Index::new(&ZERO, &Local(0), &0u8), &named("VGIA")),
                &Return::new(&Local(0)),
            ],
        ));
        device(
            "VGEN",
            vec![&id, &compatible, &description, &Finished(bytes), &address],
        )
        .to_aml_bytes(sink);
    }
}

/// Where the four bytes of the generation ID's address are in the table.
pub(super) fn generation_pointer(dsdt: &[u8]) -> Option<usize> {
    let found = dsdt
        .windows(GENERATION_NAME.len())
        .position(|window| window == GENERATION_NAME);
    found?.checked_add(GENERATION_NAME.len())
}
