// SPDX-License-Identifier: Apache-2.0
//! Power cuts while key slots change: whatever subset of the sectors since the last sync reached the disk,
//! every passphrase opens that opened before and was not to be erased.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::amend::{amend, KeyChange};
use super::Secret;
use crate::file::BlockFile;
use crate::powercut::{apply, Random};
use crate::qcow2::header::Header;
use crate::recorder::{recorded, Event};
use crate::{create_qcow2, CreateOptions, EncryptOptions};

const QUICK: Duration = Duration::from_millis(1);

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec()).unwrap()
}

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

/// Whether each passphrase opens the image in `file`.
fn opens(file: &BlockFile, texts: &[&str]) -> Vec<bool> {
    let header = Header::read(file).unwrap();
    let opened = |text: &&str| super::unlock(file, &header, Some(&secret(text))).is_ok();
    texts.iter().map(opened).collect()
}

/// Cut `change` at random places; give how often each passphrase opened, and how many cuts there were.
fn cut(path: &Path, by: &str, change: &KeyChange, texts: &[&str]) -> (Vec<u32>, u32) {
    let start = std::fs::read(path).unwrap();
    let file = BlockFile::new(open(path)).unwrap();
    let events = recorded(file.as_raw_fd(), || {
        amend(&file, &secret(by), change, false).unwrap();
    });
    let mut random = Random(0x5eed);
    let mut opened = vec![0; texts.len()];
    let mut cuts = 0;
    let mut durable = start;
    let mut since: Vec<&Event> = Vec::new();
    let target = path.with_extension("cut");
    for event in &events {
        match event {
            Event::Sync => since
                .drain(..)
                .for_each(|event| apply(&mut durable, event, &mut |_| true)),
            other => since.push(other),
        }
        for _ in 0..3 {
            let mut state = durable.clone();
            for event in &since {
                apply(&mut state, event, &mut |_| random.below(2) == 0);
            }
            let file = open(&target);
            file.write_all_at(&state, 0).unwrap();
            for (count, works) in opened
                .iter_mut()
                .zip(opens(&BlockFile::new(file).unwrap(), texts))
            {
                *count += u32::from(works);
            }
            cuts += 1;
        }
    }
    std::fs::remove_file(&target).unwrap();
    (opened, cuts)
}

#[test]
fn a_cut_never_loses_a_key_slot_that_worked() {
    let path = std::env::temp_dir().join(format!("vmbus-slots-{}", std::process::id()));
    let options = CreateOptions {
        size: 1 << 20,
        cluster_size: 4096,
        encryption: Some(EncryptOptions {
            cipher: Some("aes-128".into()),
            mode: Some("cbc".into()),
            iteration_time: QUICK,
            ..EncryptOptions::new(secret("one"))
        }),
        ..CreateOptions::default()
    };
    create_qcow2(&open(&path), None, &options).unwrap();
    let texts = ["one", "two"];
    // Slot 6 lies in two sectors, the others in one.
    for slot in [6, 1] {
        let add = KeyChange::Add {
            secret: secret("two"),
            slot: Some(slot),
            iteration_time: QUICK,
        };
        let (opened, cuts) = cut(&path, "one", &add, &texts);
        assert_eq!(
            opened[0], cuts,
            "the old passphrase, while slot {slot} is filled"
        );
        assert!((1..cuts).contains(&opened[1]), "{opened:?} of {cuts}");
        let (opened, cuts) = cut(&path, "one", &KeyChange::Erase { slot }, &texts);
        assert_eq!(
            opened[0], cuts,
            "the other passphrase, while slot {slot} is erased"
        );
        assert!(opened[1] < cuts / 2, "{opened:?} of {cuts}");
    }
    let file = BlockFile::new(open(&path)).unwrap();
    assert_eq!(opens(&file, &texts), [true, false]);
    std::fs::remove_file(path).unwrap();
}
