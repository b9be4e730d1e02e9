// SPDX-License-Identifier: Apache-2.0
//! A disk on a compressed or an encrypted image against a driver of ours, with the threads that help with these.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::{
    copy, create_qcow2, CopyOptions, CreateOptions, EncryptOptions, Format, Image, LayerFiles,
    OpenOptions, Progress, Ring, Secret,
};

use crate::pci::Place;
use crate::virtio::queue::testing::rings;
use crate::virtio::rig::{
    image, nameless_file, until_asleep, Guest, Rig, ALL_FEATURES, DISK_BYTES, REQUEST, STATUS,
};

const RINGS: u64 = 0x1_0000;
/// Eight clusters, in one request.
const DATA: u64 = 0x4_0000;
const LEN: usize = 0x8_0000;
const IN: u32 = 0;
const OUT: u32 = 1;

/// Bytes that pack well and are nowhere the same.
fn content(seed: u32) -> Vec<u8> {
    let word = |n: u32| n.wrapping_mul(0x9e37_79b1).wrapping_add(seed).to_le_bytes();
    (0..LEN as u32 / 16)
        .flat_map(|n| [word(n), [0; 4], [1; 4], [2; 4]].concat())
        .collect()
}

/// A new qcow2 image with these options, active.
fn qcow2(options: CreateOptions) -> Arc<Image> {
    let file: File = nameless_file();
    file.set_len(0).unwrap();
    let secret = options.encryption.as_ref().map(|how| how.secret.clone());
    create_qcow2(&file, None, &options).unwrap();
    let layer = LayerFiles {
        format: Format::Qcow2,
        file,
        data_file: None,
        backing_name: None,
        data_name: None,
        secret,
    };
    let options = OpenOptions {
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer], options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

fn compressed(content: &[u8]) -> Arc<Image> {
    let target = qcow2(CreateOptions {
        size: DISK_BYTES,
        ..CreateOptions::default()
    });
    let file = nameless_file();
    file.write_all_at(content, 0).unwrap();
    let how = CopyOptions {
        compress: true,
        ..CopyOptions::default()
    };
    copy(&image(file, true), &target, &how, &Progress::default()).unwrap();
    target
}

fn encrypted() -> Arc<Image> {
    let secret = Secret::new(b"passphrase".to_vec()).unwrap();
    qcow2(CreateOptions {
        size: DISK_BYTES,
        encryption: Some(EncryptOptions {
            iteration_time: Duration::from_millis(1),
            ..EncryptOptions::new(secret)
        }),
        ..CreateOptions::default()
    })
}

/// One request for [`LEN`] bytes from the disk's start on, the `nth` of its driver.
fn request(guest: &mut Guest, kind: u32, nth: u16) {
    let header = u128::from(kind);
    let memory = &guest.rig.memory;
    memory
        .write_slice(&header.to_le_bytes(), GuestAddress(REQUEST))
        .unwrap();
    memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    let flags = if kind == IN { 3 } else { 1 };
    guest.queue.descriptor(0, REQUEST, 16, 1, 1);
    guest.queue.descriptor(1, DATA, LEN as u32, flags, 2);
    guest.queue.descriptor(2, STATUS, 1, 2, 0);
    guest.queue.offer(0);
    assert_eq!(guest.ring_and_wait(nth), 0);
}

fn shown(rig: &Rig) -> Vec<u8> {
    let mut data = vec![0; LEN];
    rig.memory
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    data
}

#[test]
fn a_request_over_many_compressed_clusters_reads_what_was_packed() {
    let expected = content(1);
    for ring in [None, Ring::new(64, 8).ok()] {
        let rig = Rig::on(ring, compressed(&expected));
        let mut guest = Guest::probe(&rig, Place::disk(0));
        guest.start(ALL_FEATURES, rings(RINGS, 8));
        for nth in 1..=5 {
            rig.memory
                .write_slice(&[0xee; LEN], GuestAddress(DATA))
                .unwrap();
            request(&mut guest, IN, nth);
            assert!(shown(&rig) == expected);
        }
        until_asleep("coder-0");
    }
}

#[test]
fn what_a_guest_writes_to_an_encrypted_disk_it_reads_again() {
    for ring in [None, Ring::new(64, 8).ok()] {
        let rig = Rig::on(ring, encrypted());
        let mut guest = Guest::probe(&rig, Place::disk(0));
        guest.start(ALL_FEATURES, rings(RINGS, 8));
        for nth in [1, 3, 5] {
            let expected = content(u32::from(nth));
            rig.memory
                .write_slice(&expected, GuestAddress(DATA))
                .unwrap();
            request(&mut guest, OUT, nth);
            rig.memory
                .write_slice(&[0xee; LEN], GuestAddress(DATA))
                .unwrap();
            request(&mut guest, IN, nth + 1);
            assert!(shown(&rig) == expected);
        }
    }
}
