// SPDX-License-Identifier: Apache-2.0
//! Several I/O threads on one image, as a machine with several queues has them: they write, zero,
//! discard, flush and read neighbouring sectors of the same clusters at once, each its own sectors.
#![allow(missing_docs)]

mod support;

use std::sync::Arc;

use support::{layer, open_file, Random, Scratch};
use vmbus_qcow2::{
    check, create_qcow2, snapshot, CreateOptions, Disk, Format, Image, OpenOptions, Repair,
};

const SIZE: u64 = 4 << 20;
const THREADS: u64 = 4;
const SECTOR: u64 = 512;

fn open(scratch: &Scratch) -> Arc<Image> {
    let layers = vec![
        layer(&scratch.path("top"), Format::Qcow2, Some("base"), true),
        layer(&scratch.path("base"), Format::Raw, None, false),
    ];
    support::active(
        layers,
        OpenOptions {
            cache: 1 << 20,
            ..OpenOptions::default()
        },
    )
    .expect("open")
}

/// Work on the sectors `number`, `number + THREADS`, …; gives what they hold in the end.
fn work(mut disk: Disk, number: u64, mut random: Random) -> Vec<u8> {
    let mine = SIZE / SECTOR / THREADS;
    let mut model = vec![0xb5u8; mine as usize];
    for _ in 0..1500 {
        let n = random.below(mine);
        let offset = (n * THREADS + number) * SECTOR;
        match random.below(12) {
            0..=5 => {
                let value = random.next() as u8;
                disk.write(offset, &[value; SECTOR as usize])
                    .expect("write");
                model[n as usize] = value;
            }
            6 => {
                disk.write_zeroes(offset, SECTOR, random.below(2) == 0)
                    .expect("zero");
                model[n as usize] = 0;
            }
            7 => disk.flush().expect("flush"),
            _ => {
                let mut back = [0u8; SECTOR as usize];
                disk.read(offset, &mut back).expect("read");
                assert!(
                    back.iter().all(|byte| *byte == model[n as usize]),
                    "thread {number}, sector {n}"
                );
            }
        }
    }
    model
}

#[test]
fn threads_do_not_see_each_other_in_shared_clusters() {
    let mut random = Random::seeded("threads");
    for (cluster_size, uring) in [(65536, true), (4096, true), (512, false), (65536, false)] {
        let scratch = Scratch::new(&format!("threads-{cluster_size}-{uring}"));
        std::fs::write(scratch.path("base"), vec![0xb5; SIZE as usize]).expect("base");
        let path = scratch.path("top");
        let file = std::fs::File::create(&path)
            .map(|_| open_file(&path, true))
            .expect("create");
        let backing = Some(("base".to_owned(), Format::Raw));
        let options = CreateOptions {
            size: SIZE,
            cluster_size,
            backing,
            ..CreateOptions::default()
        };
        create_qcow2(&file, None, &options).expect("create");
        let image = open(&scratch);
        // A snapshot in between makes every cluster shared again, and its deletion frees.
        snapshot::create(&image, "before").expect("snapshot");
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let mut start = |number| {
                let image = image.clone();
                let random = Random(random.next() | 1);
                scope.spawn(move || {
                    let disk = if uring {
                        Disk::new(image)
                    } else {
                        Disk::blocking(image)
                    };
                    work(disk.expect("disk"), number, random)
                })
            };
            let threads: Vec<_> = (0..THREADS).map(&mut start).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("thread"))
                .collect()
        });
        snapshot::delete(&image, "before").expect("delete");
        let mut disk = Disk::new(image.clone()).expect("disk");
        let mut content = vec![0; SIZE as usize];
        disk.read(0, &mut content).expect("read");
        for (sector, bytes) in content.chunks(SECTOR as usize).enumerate() {
            let wanted = models[sector % THREADS as usize][sector / THREADS as usize];
            assert!(bytes.iter().all(|byte| *byte == wanted), "sector {sector}");
        }
        drop(disk);
        image.inactivate().expect("inactivate");
        let report = check(&open_file(&path, false), Repair::None, true).expect("check");
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.messages
        );
    }
}
