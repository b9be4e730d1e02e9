// SPDX-License-Identifier: Apache-2.0
//! Compressed and encrypted images on an engine whose work a pool's threads share: what is read and written is right
//! whoever did it, and nothing depends on the threads.
#![allow(missing_docs)]

mod support;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use smallvec::smallvec;
use support::{active, layer, open_file, Random, Scratch};
use vmbus_qcow2::{
    copy, create_qcow2, Completion, CopyOptions, CreateOptions, Disk, EncryptOptions, Engine,
    Format, Image, LayerFiles, Op, OpenOptions, Pool, Progress, Request, Ring, Secret, Slot,
};

const SIZE: usize = 2 << 20;
const CLUSTER: usize = 64 << 10;

/// A pool whose threads end with the test.
struct Threads {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new(count: usize) -> Threads {
        let pool = Pool::new();
        let threads = (0..count)
            .map(|_| {
                let pool = pool.clone();
                std::thread::spawn(move || pool.work())
            })
            .collect();
        Threads { pool, threads }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.pool.close();
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread of the pool panicked");
        }
    }
}

/// Bytes that can be packed, and are nowhere the same.
fn content() -> Vec<u8> {
    let mut random = Random(7);
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        let word = random.next();
        bytes.extend(word.to_le_bytes());
        bytes.extend([word as u8; 24]);
    }
    bytes
}

fn secret() -> Secret {
    Secret::new(b"passphrase".to_vec()).expect("secret")
}

/// The content in compressed clusters.
fn packed(scratch: &Scratch, zstd: bool) -> Arc<Image> {
    let path = scratch.path("packed");
    std::fs::File::create(&path).expect("create");
    let options = CreateOptions {
        size: SIZE as u64,
        cluster_size: CLUSTER as u64,
        zstd,
        ..CreateOptions::default()
    };
    create_qcow2(&open_file(&path, true), None, &options).expect("create");
    std::fs::write(scratch.path("raw"), content()).expect("content");
    let open = |name: &str, format, writable| {
        let layers = vec![layer(&scratch.path(name), format, None, writable)];
        active(layers, OpenOptions::default()).expect("open")
    };
    let (source, target) = (
        open("raw", Format::Raw, false),
        open("packed", Format::Qcow2, true),
    );
    let how = CopyOptions {
        compress: true,
        ..CopyOptions::default()
    };
    copy(&source, &target, &how, &Progress::default()).expect("copy");
    target
}

/// An encrypted image with the content.
fn encrypted(scratch: &Scratch) -> Arc<Image> {
    let path = scratch.path("encrypted");
    std::fs::File::create(&path).expect("create");
    let options = CreateOptions {
        size: SIZE as u64,
        cluster_size: CLUSTER as u64,
        encryption: Some(EncryptOptions {
            iteration_time: Duration::from_millis(1),
            ..EncryptOptions::new(secret())
        }),
        ..CreateOptions::default()
    };
    create_qcow2(&open_file(&path, true), None, &options).expect("create");
    let layers = vec![LayerFiles {
        secret: Some(secret()),
        ..layer(&path, Format::Qcow2, None, true)
    }];
    let image = active(layers, OpenOptions::default()).expect("open");
    let mut disk = Disk::new(image.clone()).expect("disk");
    disk.write(0, &content()).expect("write");
    image
}

fn engine(image: &Arc<Image>, uring: bool) -> Engine {
    match uring {
        true => Engine::uring(Ring::new(64, image.file_count()).expect("ring")),
        false => Engine::blocking().expect("engine"),
    }
}

/// Begin all of these at once, by their number.
///
/// # Safety
/// The data outlives their completions, or the engine.
unsafe fn begin(engine: &mut Engine, slot: Slot, op: Op, ranges: &[(usize, &mut [u8])]) {
    for (id, (offset, data)) in ranges.iter().enumerate() {
        let piece = libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        };
        let request = Request {
            id: id as u64,
            op,
            offset: *offset as u64,
            len: data.len() as u64,
            buffers: smallvec![piece],
        };
        // SAFETY: the caller's promise.
        unsafe { engine.submit(slot, request) };
    }
}

/// Carry all of these out at once.
fn at_once(
    engine: &mut Engine,
    image: &Arc<Image>,
    op: Op,
    ranges: &[(usize, &mut [u8])],
) -> Vec<Completion> {
    let slot = engine.attach(image.clone()).expect("attach");
    // SAFETY: the data is borrowed for all of this call, which waits for all completions.
    unsafe { begin(engine, slot, op, ranges) };
    let mut done = Vec::new();
    while done.len() < ranges.len() {
        engine.wait(&mut done).expect("wait");
    }
    engine.detach(slot).expect("nothing is under way");
    done
}

fn all_well(done: Vec<Completion>) {
    for completion in done {
        completion.result.expect("a request");
    }
}

/// Cut bytes into pieces of these lengths, over and over.
fn cut<'a>(mut bytes: &'a mut [u8], lens: &[usize]) -> Vec<(usize, &'a mut [u8])> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for len in lens.iter().cycle() {
        if bytes.is_empty() {
            break;
        }
        let (now, later) = bytes.split_at_mut((*len).min(bytes.len()));
        pieces.push((at, now));
        at += *len;
        bytes = later;
    }
    pieces
}

/// Read all of the image in many requests at once, and look whether it is `expected`.
fn reads_as(engine: &mut Engine, image: &Arc<Image>, expected: &[u8]) {
    let mut found = vec![0; SIZE];
    // Single clusters, parts of one, several, and odd ones.
    let lens = [
        CLUSTER,
        4096,
        CLUSTER - 4096,
        5 * CLUSTER,
        512,
        100_000,
        12_345,
    ];
    all_well(at_once(engine, image, Op::Read, &cut(&mut found, &lens)));
    assert!(found == expected);
}

#[test]
fn compressed_clusters_are_expanded_by_whoever_has_time() {
    for (zstd, uring) in [(false, true), (true, true), (false, false)] {
        let scratch = Scratch::new(&format!("pool-packed-{zstd}-{uring}"));
        let image = packed(&scratch, zstd);
        let expected = content();
        for count in [0, 1, 3] {
            let threads = Threads::new(count);
            let mut engine = engine(&image, uring);
            engine.use_pool(&threads.pool);
            reads_as(&mut engine, &image, &expected);
            // Some time there is a thread that is quicker than this one.
            while count > 0 && threads.pool.done() == 0 {
                reads_as(&mut engine, &image, &expected);
            }
        }
        image.inactivate().expect("inactivate");
    }
}

#[test]
fn encrypted_data_is_read_and_written_by_whoever_has_time() {
    for uring in [true, false] {
        let scratch = Scratch::new(&format!("pool-encrypted-{uring}"));
        let image = encrypted(&scratch);
        let mut expected = content();
        for count in [0, 1, 3] {
            let threads = Threads::new(count);
            let mut engine = engine(&image, uring);
            engine.use_pool(&threads.pool);
            reads_as(&mut engine, &image, &expected);
            expected.rotate_left(1);
            let mut written = expected.clone();
            let lens = [CLUSTER, 4096, 5 * CLUSTER, 512, 1 << 20];
            let op = Op::Write { fua: count == 3 };
            all_well(at_once(&mut engine, &image, op, &cut(&mut written, &lens)));
            reads_as(&mut engine, &image, &expected);
            // Another one, which does it all itself.
            let mut back = vec![0; SIZE];
            let mut disk = Disk::new(image.clone()).expect("disk");
            disk.read(0, &mut back).expect("read");
            assert!(back == expected);
        }
        image.inactivate().expect("inactivate");
    }
}

#[test]
fn one_request_at_a_time_never_waits_for_another_thread() {
    let scratch = Scratch::new("pool-lone");
    let image = packed(&scratch, false);
    let threads = Threads::new(1);
    let mut engine = engine(&image, true);
    engine.use_pool(&threads.pool);
    let expected = content();
    for n in 0..SIZE / CLUSTER {
        let mut data = [0; 4096];
        let range = [(n * CLUSTER, &mut data[..])];
        all_well(at_once(&mut engine, &image, Op::Read, &range));
        assert!(data == expected[n * CLUSTER..][..4096]);
    }
    assert_eq!(threads.pool.done(), 0);
}

#[test]
fn a_pool_that_is_closed_in_the_middle_only_means_to_do_without_it() {
    let scratch = Scratch::new("pool-closed");
    let image = packed(&scratch, false);
    let threads = Threads::new(2);
    let mut engine = engine(&image, true);
    engine.use_pool(&threads.pool);
    let expected = content();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while threads.pool.done() == 0 {
                std::thread::yield_now();
            }
            threads.pool.close();
        });
        while threads.pool.done() == 0 {
            reads_as(&mut engine, &image, &expected);
        }
    });
    reads_as(&mut engine, &image, &expected);
}

#[test]
fn an_engine_that_goes_has_nothing_in_others_hands() {
    let scratch = Scratch::new("pool-gone");
    let image = packed(&scratch, false);
    let threads = Threads::new(2);
    for _ in 0..20 {
        let mut found = vec![0; SIZE];
        let mut engine = engine(&image, true);
        engine.use_pool(&threads.pool);
        let slot = engine.attach(image.clone()).expect("attach");
        let pieces = cut(&mut found, &[CLUSTER]);
        // SAFETY: `found` outlives the engine, which waits for what is under way when it goes.
        unsafe { begin(&mut engine, slot, Op::Read, &pieces) };
        let mut done = Vec::new();
        engine.wait(&mut done).expect("wait");
        drop(engine);
        found.fill(0xee);
        std::thread::yield_now();
        assert!(found.iter().all(|byte| *byte == 0xee));
    }
    // The image is as free as it was.
    image.inactivate().expect("inactivate");
}

#[test]
fn a_cluster_that_does_not_expand_is_an_error_of_its_own_request_only() {
    let scratch = Scratch::new("pool-damaged");
    let image = packed(&scratch, true);
    // Zeros are no zstd frame: the packed clusters of the middle are lost.
    let file = open_file(&scratch.path("packed"), true);
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8192], 512 << 10).expect("damage");
    let threads = Threads::new(2);
    let mut engine = engine(&image, true);
    engine.use_pool(&threads.pool);
    let mut found = vec![0; SIZE];
    let pieces = cut(&mut found, &[CLUSTER]);
    let done = at_once(&mut engine, &image, Op::Read, &pieces);
    let expected = content();
    let failed = done.iter().filter(|one| one.result.is_err()).count();
    assert!((1..=4).contains(&failed), "{failed} failed");
    for one in done.iter().filter(|one| one.result.is_ok()) {
        let at = one.id as usize * CLUSTER;
        assert!(pieces[one.id as usize].1 == &expected[at..][..CLUSTER]);
    }
}
