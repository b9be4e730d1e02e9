// SPDX-License-Identifier: Apache-2.0
//! Kernels that are whole are entered where they say; kernels with any byte changed never do harm.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::MemoryKind;
use crate::error::Kind;
use crate::memory::GuestMemoryMmap;

const MEMORY: u64 = 32 << 20;

fn file(bytes: &[u8], argument: &'static str) -> BootFile {
    // SAFETY: a fresh memfd, owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(libc::memfd_create(c"kernel".as_ptr(), 0)) };
    file.write_all(bytes).unwrap();
    BootFile::new(file.into(), argument).unwrap()
}

fn boot(kernel: &[u8]) -> Boot {
    Boot {
        kernel: file(kernel, "kernel"),
        initrd: Some(file(&[7; 5000], "initrd")),
        cmdline: "quiet".to_owned(),
        memory: MEMORY,
        rsdp: 0xe_0000,
    }
}

fn ram() -> GuestMemoryMmap {
    let plan = crate::memory::Plan::of(MemoryKind::Mergeable, MEMORY);
    crate::memory::create(&plan, None).unwrap()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// One segment of 256 bytes at 2 MiB, 8 KiB in memory, entered at its byte 16; a note that says so.
fn elf() -> Vec<u8> {
    let mut bytes = vec![0u8; 0x300];
    put(&mut bytes, 0, b"\x7fELF\x02\x01\x01");
    put(&mut bytes, 16, &[2, 0, 62, 0]);
    put(&mut bytes, 32, &64u64.to_le_bytes());
    put(&mut bytes, 54, &[56, 0, 2, 0]);
    for (at, kind, offset, address, file_size, memory_size) in [
        (64, 1u32, 0x200u64, 0x20_0000u64, 0x100u64, 0x2000u64),
        (120, 4, 0x180, 0, 20, 20),
    ] {
        put(&mut bytes, at, &kind.to_le_bytes());
        for (place, value) in [
            (8, offset),
            (24, address),
            (32, file_size),
            (40, memory_size),
        ] {
            put(&mut bytes, at + place, &value.to_le_bytes());
        }
    }
    put(&mut bytes, 0x180, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    put(&mut bytes, 0x190, &0x20_0010u32.to_le_bytes());
    bytes[0x200..].fill(0xf4);
    bytes
}

fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0u8; 1024];
    bytes[0x1f1] = 1;
    put(&mut bytes, 0x1f4, &64u32.to_le_bytes());
    put(&mut bytes, 0x1fe, b"\x55\xaa");
    put(&mut bytes, 0x202, b"HdrS\x0f\x02");
    bytes[0x211] = 1;
    put(&mut bytes, 0x22c, &0x01ff_ffffu32.to_le_bytes());
    bytes[0x236] = 1;
    put(&mut bytes, 0x238, &2047u32.to_le_bytes());
    put(&mut bytes, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut bytes, 0x260, &0x10_0000u32.to_le_bytes());
    bytes.resize(1024 + 16 * 64, 0xf4);
    bytes
}

#[test]
fn an_elf_is_loaded_and_entered_where_its_note_says() {
    let memory = ram();
    memory.write_obj(0xffu8, GuestAddress(0x20_1000)).unwrap();
    let entry = boot(&elf()).load(&memory).unwrap();
    assert_eq!(
        entry,
        Entry::Pvh {
            eip: 0x20_0010,
            start_info: START_INFO as u32
        }
    );
    let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!((read(0x20_0000), read(0x20_00ff)), (0xf4, 0xf4));
    // What was there before the load is cleared.
    assert_eq!(read(0x20_1000), 0);
}

#[test]
fn a_bzimage_is_entered_512_bytes_behind_its_setup() {
    let memory = ram();
    let entry = boot(&bzimage()).load(&memory).unwrap();
    assert!(matches!(
        entry,
        Entry::Linux64 {
            rip: 0x100_0200,
            boot_params: ZERO_PAGE,
            ..
        }
    ));
    let u32_at = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
    // ramdisk_image and ramdisk_size: as high as the kernel takes it, on a page.
    assert_eq!(u32_at(ZERO_PAGE + 0x218), (MEMORY - 0x2000) as u32);
    assert_eq!(u32_at(ZERO_PAGE + 0x21c), 5000);
    assert_eq!(
        memory
            .read_obj::<u8>(GuestAddress(MEMORY - 0x2000))
            .unwrap(),
        7
    );
}

#[test]
fn the_initrd_lies_where_the_kernel_can_reach_it() {
    let memory = ram();
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, &0x0180_0fffu32.to_le_bytes());
    boot(&kernel).load(&memory).unwrap();
    let address = memory
        .read_obj::<u32>(GuestAddress(ZERO_PAGE + 0x218))
        .unwrap();
    assert_eq!(address, 0x0180_1000 - 0x2000);
}

#[test]
fn a_kernel_with_bytes_changed_is_loaded_or_refused_by_name() {
    let memory = ram();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut loaded, mut refused) = (0, 0);
    for round in 0..4000 {
        let mut kernel = if round % 2 == 0 { elf() } else { bzimage() };
        // Where all the numbers lie.
        let header = if round % 2 == 0 {
            4..0x198
        } else {
            0x1f1..0x26c
        };
        for _ in 0..1 + next() % 3 {
            let at = header.start + next() as usize % header.len();
            kernel[at] = next() as u8;
        }
        if next() % 8 == 0 {
            kernel.truncate(next() as usize % kernel.len());
        }
        match boot(&kernel).load(&memory) {
            Ok(_) => loaded += 1,
            Err(error) => {
                assert!(
                    matches!(error.kind, Kind::ImageInvalid | Kind::InvalidArgument),
                    "{error:?}"
                );
                assert_ne!(error.argument, "", "{error:?}");
                refused += 1;
            }
        }
    }
    assert!(
        loaded > 100 && refused > 100,
        "{loaded} loaded, {refused} refused"
    );
}
