// SPDX-License-Identifier: Apache-2.0
//! Where everything lies in the guest's physical address space and its port space.
//!
//! The places are those of QEMU's Q35, so that firmware written for it (SeaBIOS, OVMF) finds what it
//! expects. They are part of the machine type.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | 0xa0000 | RAM |
//! | 0xa0000 | 0x100000 | RAM, reserved in the memory map: the ACPI tables lie here |
//! | 0x100000 | 0x8000_0000 | low RAM |
//! | 0x8000_0000 | 0xfec0_0000 | PCI: BARs and the ECAM, which firmware may move |
//! | 0xb000_0000 | 0xc000_0000 | of that, the PCIe ECAM after power-on, buses 0 to 255 |
//! | 0xc000_0000 | 0xfec0_0000 | of that, the window that BARs lie in when there is no firmware |
//! | 0xfec0_0000 | | I/O APIC |
//! | 0xfed4_0000 | 0xfed4_5000 | kept for a TPM |
//! | 0xfee0_0000 | | local APIC |
//! | 0xfeff_c000 | 0xff00_0000 | KVM's identity map page and TSS (VMX without unrestricted guest) |
//! | 0xff80_0000 | 4 GiB | firmware: variables, then code, which ends with the address space of 32 bits |
//! | 4 GiB | 512 GiB | high RAM; what it leaves is kept for virtio-mem |
//! | 512 GiB | 768 GiB | 64-bit MMIO window |
//!
//! 0xc0000 to 0xfffff is RAM or the last of the firmware: the shadow area (`firmware/shadow.rs`). A PCI BAR decodes wherever
//! nothing else is: firmware places BARs by its own rules.
//!
//! The last is below AMD's HyperTransport hole at 1012 GiB and within 40 physical address bits, which
//! all CPU models here have.

/// Low RAM never reaches further than this; what does not fit goes to [`HIGH_RAM_START`].
pub const LOW_RAM_MAX: u64 = 0x8000_0000;
/// The first byte that is not conventional memory: the end of the low 640 KiB.
pub const CONVENTIONAL_END: u64 = 0xa_0000;
/// Where the memory that firmware may shadow begins.
pub const SHADOW_START: u64 = 0xc_0000;
/// Where extended memory begins.
pub const EXTENDED_START: u64 = 0x10_0000;
/// RAM that lies above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// The 64-bit MMIO window begins here, so high RAM ends here.
pub const HIGH_RAM_END: u64 = MMIO64_START;

/// The PCIe extended configuration space.
pub const ECAM_START: u64 = 0xb000_0000;
/// 256 buses of 1 MiB each.
pub const ECAM_SIZE: u64 = 0x1000_0000;

/// BARs of 32 bits and the non-prefetchable windows of root ports.
pub const MMIO32_START: u64 = 0xc000_0000;
/// Size of that window: up to the I/O APIC.
pub const MMIO32_SIZE: u64 = 0x3ec0_0000;
/// BARs of 64 bits and the prefetchable windows of root ports.
pub const MMIO64_START: u64 = 0x80_0000_0000;
/// Size of that window.
pub const MMIO64_SIZE: u64 = 0x40_0000_0000;
/// Ports for PCI devices.
pub const PIO_WINDOW_START: u64 = 0xc000;
/// Size of that window, in ports.
pub const PIO_WINDOW_SIZE: u64 = 0x4000;

/// Addresses of 32 bits that are PCI's, wherever RAM ends.
pub const PCI32_START: u64 = LOW_RAM_MAX;
/// The end of these.
pub const PCI32_END: u64 = IOAPIC_START;
/// The firmware ends here.
pub const FIRMWARE_END: u64 = 1 << 32;

/// The I/O APIC's registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Where the registers of a TPM will be (TCG PC Client Platform TPM Profile 1.05, 6.2): five localities. Nothing is there yet.
pub const TPM_START: u64 = 0xfed4_0000;
/// Bytes of these.
pub const TPM_SIZE: u64 = 0x5000;
/// Memory that comes while the machine runs (virtio-mem) will lie behind the high RAM, up to here.
pub const MEMORY_DEVICE_END: u64 = HIGH_RAM_END;
/// The local APICs' registers.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// KVM's identity map page.
pub const IDENTITY_MAP: u64 = 0xfeff_c000;
/// KVM's three TSS pages.
pub const TSS: u64 = 0xfeff_d000;

/// Interrupt lines of the I/O APIC; MSIs have the numbers from here up.
pub const GSI_MSI_FIRST: u32 = 24;
/// The ACPI system control interrupt.
pub const SCI: u32 = 9;
/// The serial port's interrupt.
pub const COM1_IRQ: u32 = 4;
/// The real-time clock's interrupt.
pub const RTC_IRQ: u32 = 8;

/// The first serial port.
pub const COM1: u64 = 0x3f8;
/// Index and data port of the CMOS memory.
pub const CMOS: u64 = 0x70;
/// The keyboard controller's data port; its command port is at 0x64.
pub const I8042_DATA: u64 = 0x60;
/// The keyboard controller's command and status port.
pub const I8042_COMMAND: u64 = 0x64;
/// The A20 gate and the fast reset.
pub const PORT_92: u64 = 0x92;
/// What the panicking guest tells.
pub const PVPANIC: u64 = 0x505;
/// The firmware configuration device: selector, data, and the address of a transfer.
pub const FW_CFG: u64 = 0x510;
/// Its ports.
pub const FW_CFG_SIZE: u64 = 12;
/// The reset control register, inside [`PCI_CONFIG`]'s range.
pub const RESET_CONTROL: u64 = 0xcf9;
/// PCI configuration mechanism #1: address at 0xcf8, data at 0xcfc.
pub const PCI_CONFIG: u64 = 0xcf8;
/// The ICH9 power management block (PMBASE), 128 ports.
pub const PM_BASE: u64 = 0x600;
/// Size of that block.
pub const PM_SIZE: u64 = 0x80;
