// SPDX-License-Identifier: Apache-2.0
//! A damaged image, and what is done to it.
//!
//! The input is a program: which sample image to begin with, then records. A record changes bytes of
//! the file (while it is closed) or does something to the disk. Checked are:
//!
//! - nothing panics and, by libFuzzer's own clock, nothing hangs;
//! - memory stays within 64 MiB beyond the cache;
//! - looking at an image writes nothing;
//! - whatever a pointer says, the file grows by what was written;
//! - an undamaged image stays sound, and holds what was written to it;
//! - what `check` calls repaired, it finds in order afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use vmbus_qcow2::{
    check, copy, create_qcow2, info, range_at, resize, snapshot, CopyOptions, CreateOptions, Disk,
    Format, Image, OpenOptions, Progress, Repair,
};

use crate::disk::{content, file, open, CACHE};
use crate::input::Input;
use crate::memory::{bounded, LIMIT};

const SIZE: u64 = 256 << 10;
/// No run of records needs more to show what it has to show.
const RECORDS: usize = 64;

/// An image with its guest's view.
struct Sample {
    image: Vec<u8>,
    disk: Vec<u8>,
}

fn samples() -> &'static [Sample] {
    static SAMPLES: OnceLock<Vec<Sample>> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        [(512, 16), (4096, 1), (65536, 16), (2048, 64)]
            .map(|(size, bits)| sample(size, bits))
            .into()
    })
}

/// A small image with something of everything: data, zero clusters, compressed clusters, a snapshot.
fn sample(cluster_size: u64, refcount_bits: u32) -> Sample {
    let target = file(&[]);
    let options = CreateOptions {
        size: SIZE,
        cluster_size,
        refcount_bits,
        ..CreateOptions::default()
    };
    create_qcow2(&target, None, &options).expect("create");
    let text = file(&b"words that compress, ".repeat(5000));
    let image = open(&target, Format::Qcow2, false).expect("open");
    let source = open(&text, Format::Raw, true).expect("open");
    let packed = CopyOptions {
        compress: true,
        threads: 1,
        ..CopyOptions::default()
    };
    copy(&source, &image, &packed, &Progress::default()).expect("copy");
    let mut disk = Disk::blocking(image.clone()).expect("disk");
    disk.write(SIZE / 2, &[0x77; 50_000]).expect("write");
    disk.write_zeroes(SIZE / 2 + 16384, 16384, false)
        .expect("zero");
    if refcount_bits > 1 {
        snapshot::create(&image, "one").expect("snapshot");
    }
    disk.write(SIZE / 2, &[0x78; 5000]).expect("write");
    let mut seen = vec![0; SIZE as usize];
    disk.read(0, &mut seen).expect("read");
    drop(disk);
    image.inactivate().expect("inactivate");
    Sample {
        image: content(&target),
        disk: seen,
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let samples = samples();
    let mut input = Input::new(data);
    let sample = &samples[input.below(samples.len() as u64) as usize];
    let bed = Bed {
        file: file(&sample.image),
        model: Some(sample.disk.clone()),
        open: None,
        written: sample.image.len() as u64,
    };
    // The file's own content counts where a copy of it is held for comparing.
    bounded("an image", LIMIT + CACHE + (4 << 20), || {
        bed.follow(&mut input)
    });
}

struct Bed {
    file: File,
    /// What the disk holds; None once the image was damaged.
    model: Option<Vec<u8>>,
    open: Option<(Arc<Image>, Disk)>,
    /// An upper bound of the file's length.
    written: u64,
}

impl Bed {
    fn follow(mut self, input: &mut Input) {
        for _ in 0..RECORDS {
            if input.is_empty() {
                break;
            }
            self.record(input);
        }
        self.close();
        self.look();
        self.repair(Repair::Leaks);
        self.repair(Repair::All);
        let len = self.file.metadata().expect("fstat").len();
        assert!(
            len <= self.written + (64 << 20),
            "the file has grown to {len} bytes"
        );
    }

    fn record(&mut self, input: &mut Input) {
        match input.number(1) % 20 {
            0..=5 => self.damage(input),
            6 => self.cut(input),
            7 => self.look(),
            8 => self.close(),
            9..=11 => self.write(input),
            12 => self.zero(input),
            13 => self.flush(),
            14 => self.name("create", |image| snapshot::create(image, "two").map(drop)),
            15 => self.rewind(input),
            16 => self.name("delete", |image| snapshot::delete(image, "one")),
            17 => self.resize(input),
            18 => self.read(),
            _ => self.pack(input),
        }
    }

    /// Change up to 8 bytes, anywhere, in the header or at the start of a cluster.
    fn damage(&mut self, input: &mut Input) {
        self.close();
        let len = self.file.metadata().expect("fstat").len();
        let at = match input.number(1) % 4 {
            0 => input.below(120),
            1 => input.below((len / 512).max(1)) * 512,
            2 => input.below((len / 8).max(1)) * 8,
            _ => input.below(len.max(1)),
        };
        let width = 1 << input.below(4);
        let value = match input.number(1) % 3 {
            0 => input.number(8),
            // A pointer into the file, with the flags an entry may have.
            1 => (input.below((len / 512).max(1)) * 512) | ((input.number(1) & 3) << 62),
            _ => 1 << input.below(64),
        };
        let bytes = value.to_be_bytes();
        if at + width > len {
            return;
        }
        self.file
            .write_all_at(&bytes[8 - width as usize..], at)
            .expect("write to memory");
        self.model = None;
    }

    fn cut(&mut self, input: &mut Input) {
        self.close();
        let len = self.file.metadata().expect("fstat").len();
        self.file
            .set_len(input.below(len + 1024))
            .expect("truncate memory");
        self.model = None;
    }

    /// Everything that only looks.
    fn look(&mut self) {
        self.close();
        let before = content(&self.file);
        let _ = info(&self.file, Format::Qcow2, true);
        let report = check(&self.file, Repair::None, false);
        if self.model.is_some() {
            let report = report.expect("a sound image is checked");
            assert_eq!(report.corruptions, 0, "{:?}", report.messages);
        }
        if let Ok(image) = open(&self.file, Format::Qcow2, true) {
            read_all(&image, self.model.as_deref());
            let _ = snapshot::list(&image);
            image.inactivate().expect("nothing to write");
        }
        let options = OpenOptions {
            read_only: true,
            cache: CACHE,
            locks: false,
            snapshot: Some("one".to_owned()),
            ..OpenOptions::default()
        };
        let layer = vmbus_qcow2::LayerFiles {
            format: Format::Qcow2,
            file: self.file.try_clone().expect("dup"),
            data_file: None,
            backing_name: None,
            data_name: None,
            secret: None,
        };
        if let Ok(image) = Image::open_chain(vec![layer], options) {
            if image.activate().is_ok() {
                read_all(&Arc::new(image), None);
            }
        }
        assert!(content(&self.file) == before, "a look wrote");
    }

    fn repair(&mut self, how: Repair) {
        let Ok(first) = check(&self.file, how, false) else {
            return;
        };
        let again = check(&self.file, Repair::None, false).expect("it was checked before");
        assert_eq!(
            (first.corruptions, first.leaks),
            (again.corruptions, again.leaks),
            "{how:?} reported another rest than there is: {:?}",
            again.messages
        );
        if self.model.is_some() {
            assert_eq!(again.corruptions, 0, "{:?}", again.messages);
        }
        if how == Repair::All && again.corruptions == 0 {
            assert_eq!(again.leaks, 0, "{:?}", again.messages);
        }
    }

    /// The image open for writing, if it opens.
    fn active(&mut self) -> Option<&mut (Arc<Image>, Disk)> {
        if self.open.is_none() {
            let image = match open(&self.file, Format::Qcow2, false) {
                Ok(image) => image,
                Err(error) => {
                    assert!(self.model.is_none(), "a sound image does not open: {error}");
                    return None;
                }
            };
            let disk = Disk::blocking(image.clone()).expect("disk");
            self.open = Some((image, disk));
        }
        self.open.as_mut()
    }

    fn close(&mut self) {
        if let Some((image, disk)) = self.open.take() {
            drop(disk);
            let closed = image.inactivate();
            assert!(closed.is_ok() || self.model.is_none(), "{closed:?}");
        }
    }

    fn range(&mut self, input: &mut Input) -> Option<(u64, u64)> {
        let size = self.active()?.0.size();
        let at = input.below(SIZE.min(size).max(1));
        let len = 1 + input.below(40_000);
        (at < size).then(|| (at, len.min(size - at)))
    }

    fn write(&mut self, input: &mut Input) {
        let Some((at, len)) = self.range(input) else {
            return;
        };
        let value = input.number(1) as u8;
        self.written += len + (1 << 17);
        let data = vec![value; len as usize];
        let Some((_, disk)) = self.active() else {
            return;
        };
        let done = disk.write(at, &data);
        self.expect(done, |disk| {
            disk[at as usize..(at + len) as usize].fill(value)
        });
    }

    fn zero(&mut self, input: &mut Input) {
        let Some((at, len)) = self.range(input) else {
            return;
        };
        let kind = input.number(1) % 3;
        self.written += 1 << 18;
        let Some((_, disk)) = self.active() else {
            return;
        };
        let done = match kind {
            0 => disk.write_zeroes(at, len, false),
            1 => disk.write_zeroes(at, len, true),
            _ => {
                // Which bytes a discard drops is not promised.
                let done = disk.discard(at, len);
                let mut now = vec![0; len as usize];
                let seen = disk.read(at, &mut now);
                assert!(
                    self.model.is_none() || (done.is_ok() && seen.is_ok()),
                    "{done:?} {seen:?}"
                );
                if let Some(model) = &mut self.model {
                    let old = &mut model[at as usize..(at + len) as usize];
                    assert!(old
                        .iter()
                        .zip(&now)
                        .all(|(old, now)| old == now || *now == 0));
                    old.copy_from_slice(&now);
                }
                return;
            }
        };
        self.expect(done, |disk| disk[at as usize..(at + len) as usize].fill(0));
    }

    fn flush(&mut self) {
        if let Some((_, disk)) = self.active() {
            let done = disk.flush();
            self.expect(done, |_| {});
        }
    }

    /// A snapshot's making or end, which changes no content. It may be refused: no such name, refcounts
    /// too narrow.
    fn name(&mut self, _what: &str, act: impl FnOnce(&Image) -> vmbus_qcow2::Result<()>) {
        self.written += 1 << 18;
        if let Some((image, _)) = self.active() {
            let _ = act(image);
        }
    }

    fn rewind(&mut self, input: &mut Input) {
        let name = ["one", "two"][input.below(2) as usize];
        self.written += 1 << 18;
        let Some((image, _)) = self.active() else {
            return;
        };
        let before = image.size();
        if snapshot::apply(image, name).is_ok() || image.size() != before {
            // The content from now on is what it is: it is the samples' and the writes' business.
            let (image, _) = self.open.as_ref().expect("it is open");
            let now = self.model.is_some().then(|| read_all(image, None));
            self.model = now;
        }
    }

    fn resize(&mut self, input: &mut Input) {
        let size = (1 + input.below(2 * SIZE / 512)) * 512;
        self.written += 1 << 18;
        let Some((image, _)) = self.active() else {
            return;
        };
        let done = resize(image, size, true);
        self.expect_or_refusal(done, |disk| disk.resize(size as usize, 0));
    }

    fn read(&mut self) {
        let model = self.model.take();
        if let Some((image, _)) = self.active() {
            read_all(image, model.as_deref());
        }
        self.model = model;
    }

    /// Compressed clusters over what is there.
    fn pack(&mut self, input: &mut Input) {
        let value = input.number(1) as u8;
        // Whole clusters: what lies behind the source's end in its last one is nobody's.
        let len = 65536 * (1 + input.below(3)) as usize;
        self.written += 1 << 18;
        let Some((image, _)) = self.active() else {
            return;
        };
        if image.size() < len as u64 {
            return;
        }
        let source = open(&file(&vec![value; len]), Format::Raw, true).expect("a raw file");
        let options = CopyOptions {
            compress: true,
            threads: 1,
            sparse: 0,
            ..CopyOptions::default()
        };
        let done = copy(&source, image, &options, &Progress::default()).map(|_lost| ());
        self.expect(done, |disk| disk[..len].fill(value));
    }

    /// A sound image does what it is asked to; a damaged one may refuse.
    fn expect(&mut self, done: vmbus_qcow2::Result<()>, change: impl FnOnce(&mut Vec<u8>)) {
        match (&mut self.model, done) {
            (Some(model), Ok(())) => change(model),
            (Some(_), Err(error)) => panic!("a sound image: {error}"),
            (None, _) => {}
        }
    }

    fn expect_or_refusal(
        &mut self,
        done: vmbus_qcow2::Result<()>,
        change: impl FnOnce(&mut Vec<u8>),
    ) {
        if let (Some(model), Ok(())) = (&mut self.model, done) {
            change(model);
        }
    }
}

/// Read the disk's first part, and ask where it comes from.
fn read_all(image: &Arc<Image>, model: Option<&[u8]>) -> Vec<u8> {
    let mut disk = Disk::blocking(image.clone()).expect("disk");
    let end = image.size().min(2 * SIZE);
    let mut seen = vec![0; end as usize];
    for (n, part) in seen.chunks_mut(65536).enumerate() {
        let at = n as u64 * 65536;
        let done = disk.read(at, part);
        let _ = range_at(image, at, 65536);
        assert!(done.is_ok() || model.is_none(), "{done:?}");
    }
    if let Some(model) = model {
        assert!(seen == model, "the disk does not hold what was written");
    }
    seen
}
