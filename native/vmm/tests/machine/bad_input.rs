// SPDX-License-Identifier: Apache-2.0
//! What is not a kernel, or does not fit, is refused with a name before anything runs; nothing stays open.

use std::io::Write;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use serde_json::json;
use vmbus_vmm::{Error, Kind};

use crate::{build, fd, guest, requires_kvm};

/// A file with these bytes, open for reading.
fn file(bytes: &[u8]) -> i32 {
    // SAFETY: a fresh memfd, owned by nobody else.
    let mut file = unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"kernel".as_ptr(), 0)) };
    file.write_all(bytes).unwrap();
    file.into_raw_fd()
}

fn refusal(kernel: i32) -> Error {
    let kernel = json!({ "fd": kernel, "cmdline": "hello" });
    match build("", json!({ "kernel": kernel })) {
        Ok(_) => panic!("it was built"),
        Err(error) => error,
    }
}

/// The guest with `change` made to its bytes.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> i32 {
    let mut bytes = std::fs::read(guest()).unwrap();
    change(&mut bytes);
    file(&bytes)
}

#[test]
fn a_directory_and_a_device_are_no_kernels() {
    requires_kvm!();
    for path in ["/", "/dev/null"] {
        let error = refusal(fd(path));
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "kernel"),
            "{path}"
        );
    }
}

#[test]
fn a_pipe_is_no_kernel() {
    requires_kvm!();
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: ours; the reading end is the machine's from here on.
    let _write = unsafe { OwnedFd::from_raw_fd(ends[1]) };
    assert_eq!(refusal(ends[0]).argument, "kernel");
}

#[test]
fn a_file_that_is_no_kernel_is_said_to_be_none() {
    requires_kvm!();
    for bytes in [&b""[..], b"MZ", &[0; 4096], &b"#!/bin/sh\n".repeat(100)] {
        let error = refusal(file(bytes));
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::ImageInvalid, "kernel"),
            "{}",
            bytes.len()
        );
    }
}

#[test]
fn an_elf_cut_off_anywhere_is_refused() {
    requires_kvm!();
    let whole = std::fs::read(guest()).unwrap();
    // Up to the end of what is loaded; section headers behind it are not needed.
    for len in [1, 4, 63, 64, 100, 0x1000, 0x1001, 0x1800] {
        let error = refusal(file(&whole[..len]));
        assert_eq!(error.kind, Kind::ImageInvalid, "{len} bytes: {error}");
    }
}

#[test]
fn an_elf_with_hostile_numbers_is_refused() {
    requires_kvm!();
    // Offsets in the file: ELF header 0 to 64, then program headers of 56 bytes.
    let cases: [(&str, usize, Vec<u8>); 11] = [
        ("machine", 18, vec![3, 0]),
        (
            "program headers at the end of all numbers",
            32,
            vec![0xff; 8],
        ),
        ("size of a program header", 54, vec![1, 0]),
        ("no program headers", 56, vec![0, 0]),
        ("too many program headers", 56, vec![0xff, 0xff]),
        ("file offset beyond the file", 64 + 8, vec![0xff; 8]),
        (
            "address below 1 MiB",
            64 + 24,
            vec![0, 0x10, 0, 0, 0, 0, 0, 0],
        ),
        (
            "address beyond RAM",
            64 + 24,
            vec![0, 0, 0, 0x70, 0, 0, 0, 0],
        ),
        ("address that wraps", 64 + 24, vec![0xff; 8]),
        ("file size beyond memory size", 64 + 32, vec![0xff; 8]),
        (
            "memory size beyond RAM",
            64 + 40,
            vec![0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0],
        ),
    ];
    for (what, at, bytes) in cases {
        let error = refusal(changed(|kernel| {
            kernel[at..at + bytes.len()].copy_from_slice(&bytes)
        }));
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::ImageInvalid, "kernel"),
            "{what}: {error}"
        );
    }
}

#[test]
fn an_elf_whose_entry_is_elsewhere_or_missing_is_refused() {
    requires_kvm!();
    let note = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0";
    let at = |kernel: &[u8]| {
        kernel
            .windows(note.len())
            .position(|bytes| bytes == note)
            .unwrap()
    };
    let error = refusal(changed(|kernel| {
        let at = at(kernel);
        kernel[at + 16..at + 20].copy_from_slice(&[0, 0, 0, 0x40]);
    }));
    assert_eq!(error.kind, Kind::ImageInvalid, "{error}");
    let error = refusal(changed(|kernel| {
        let at = at(kernel);
        kernel[at + 8] = 17;
    }));
    assert!(error.message.contains("PVH"), "{error}");
    let error = refusal(changed(|kernel| {
        let at = at(kernel);
        kernel[at..at + 4].copy_from_slice(&[0xff; 4]);
    }));
    assert!(error.message.contains("PVH"), "{error}");
}

/// A boot sector and one of setup code that say they are a kernel of `paragraphs` times 16 bytes.
fn bzimage(paragraphs: u32, change: impl FnOnce(&mut Vec<u8>)) -> i32 {
    let mut bytes = vec![0; 1024];
    bytes[0x1f1] = 1;
    bytes[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    bytes.resize(1024 + 16 * 64, 0xf4);
    change(&mut bytes);
    file(&bytes)
}

#[test]
fn a_bzimage_that_is_whole_is_accepted() {
    requires_kvm!();
    let kernel = json!({ "fd": bzimage(64, |_| ()) });
    build("", json!({ "kernel": kernel })).map(|_| ()).unwrap();
}

#[test]
fn a_bzimage_with_hostile_numbers_is_refused() {
    requires_kvm!();
    let set = |at: usize, value: Vec<u8>| {
        move |bytes: &mut Vec<u8>| bytes[at..at + value.len()].copy_from_slice(&value)
    };
    for (what, kernel, kind) in [
        ("cut off", bzimage(65, |_| ()), Kind::ImageInvalid),
        (
            "more than any file has",
            bzimage(u32::MAX, |_| ()),
            Kind::ImageInvalid,
        ),
        (
            "old protocol",
            bzimage(64, set(0x206, vec![0, 2])),
            Kind::ImageInvalid,
        ),
        (
            "not 64-bit",
            bzimage(64, set(0x236, vec![0])),
            Kind::ImageInvalid,
        ),
        (
            "zImage",
            bzimage(64, set(0x211, vec![0])),
            Kind::ImageInvalid,
        ),
        (
            "loaded at 0",
            bzimage(64, set(0x258, vec![0; 8])),
            Kind::ImageInvalid,
        ),
        (
            "loaded nowhere",
            bzimage(64, set(0x258, vec![0xff; 8])),
            Kind::ImageInvalid,
        ),
        (
            "loaded high above",
            bzimage(64, set(0x258, vec![0, 0, 0, 0, 1, 0, 0, 0])),
            Kind::InvalidArgument,
        ),
        (
            "needs more memory",
            bzimage(64, set(0x260, vec![0xff; 4])),
            Kind::InvalidArgument,
        ),
        (
            "setup beyond the file",
            bzimage(64, set(0x1f1, vec![0xff])),
            Kind::ImageInvalid,
        ),
    ] {
        let error = refusal(kernel);
        assert_eq!(error.kind, kind, "{what}: {error}");
        assert_ne!(error.argument, "", "{what}: {error}");
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    requires_kvm!();
    let big = file(&[]);
    // SAFETY: ours; sparse.
    assert_eq!(unsafe { libc::ftruncate(big, 80 << 20) }, 0);
    let kernel = json!({ "fd": fd(guest()), "initrd_fd": big });
    let error = build("", json!({ "kernel": kernel })).err().unwrap();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::InvalidArgument, "initrd")
    );
}

#[test]
fn what_is_not_kvm_is_refused() {
    requires_kvm!();
    let error = build("hello", json!({ "kvm_fd": fd("/dev/null") }))
        .err()
        .unwrap();
    assert_eq!(error.argument, "kvm_fd");
}

#[test]
fn a_refused_build_closes_every_descriptor_that_it_was_given() {
    requires_kvm!();
    let (kernel, initrd) = (fd("/"), fd("/"));
    let numbers = json!({ "fd": kernel, "initrd_fd": initrd });
    assert!(build("", json!({ "kernel": numbers, "vcpus": 0 })).is_err());
    for fd in [kernel, initrd] {
        // Other tests open files at the same time, but none opens `/` and keeps it.
        let target = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        assert_ne!(
            target.ok().as_deref(),
            Some(std::path::Path::new("/")),
            "fd {fd}"
        );
    }
}
