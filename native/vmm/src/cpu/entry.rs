// SPDX-License-Identifier: Apache-2.0
//! Where the first vCPU begins: the registers that a boot protocol asks for.
//!
//! | protocol | mode | pointer | source |
//! |---|---|---|---|
//! | Linux, 64-bit | long mode, paging on, flat segments | rsi: boot_params | Documentation/arch/x86/boot.rst, 1.14 |
//! | firmware | real mode, at the reset vector | | Intel SDM 3A, 10.1.4 |
//! | PVH | protected mode, paging off, flat segments | ebx: hvm_start_info | xen/include/public/arch-x86/hvm/start_info.h |

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// The selector of a flat code segment in [`GDT`].
const CODE: u16 = 0x10;
/// The selector of a flat data segment in [`GDT`].
const DATA: u16 = 0x18;
/// The selector of a task state segment in [`GDT`].
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The descriptors that the boot code puts into guest memory for a 64-bit entry.
pub const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // CODE: 64-bit, execute and read
    0x00cf_9300_0000_ffff, // DATA: read and write
    0x008f_8b00_0000_ffff, // TASK: busy 64-bit TSS
];

/// Registers at the first instruction of the first vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The reset vector, 16 bytes below 4 GiB: the registers are as they are.
    Reset,
    /// A Linux kernel's 64-bit entry.
    Linux64 {
        /// The first instruction.
        rip: u64,
        /// The zero page.
        boot_params: u64,
        /// The top of a page table that maps the first 4 GiB onto themselves.
        page_table: u64,
        /// Where [`GDT`] lies.
        gdt: u64,
    },
    /// A PVH entry.
    Pvh {
        /// The first instruction.
        eip: u32,
        /// hvm_start_info.
        start_info: u32,
    },
}

impl Entry {
    /// Changes the registers of a vCPU in the reset state.
    pub fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        let fresh = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        let (long, task) = match *self {
            Entry::Reset => return,
            Entry::Linux64 {
                rip,
                boot_params,
                page_table,
                gdt,
            } => {
                *regs = kvm_regs {
                    rip,
                    rsi: boot_params,
                    ..fresh
                };
                sregs.gdt.base = gdt;
                sregs.gdt.limit = (std::mem::size_of_val(&GDT) as u16).saturating_sub(1);
                sregs.cr3 = page_table;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                (true, 0xfffff)
            }
            Entry::Pvh { eip, start_info } => {
                *regs = kvm_regs {
                    rip: u64::from(eip),
                    rbx: u64::from(start_info),
                    ..fresh
                };
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                (false, 0x67)
            }
        };
        sregs.idt.limit = 0;
        sregs.cs = segment(CODE, 0b1011, long);
        let data = segment(DATA, 0b0011, false);
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = data;
        }
        sregs.tr = kvm_segment {
            selector: TASK,
            limit: task,
            type_: 0b1011,
            present: 1,
            ..Default::default()
        };
    }
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
