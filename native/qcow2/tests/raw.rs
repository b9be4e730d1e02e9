// SPDX-License-Identifier: Apache-2.0
//! Raw images through both engines.
#![allow(missing_docs)]

use std::fs::{File, OpenOptions as FileOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::smallvec;
use vmbus_qcow2::{
    Completion, Disk, Engine, Format, Image, Kind, LayerFiles, Op, OpenOptions, Request, Ring,
};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("vmbus-raw-{}-{name}", std::process::id()));
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn open(path: &Path, flags: i32) -> File {
    FileOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .expect("open")
}

fn image(file: File) -> Arc<Image> {
    let layer = LayerFiles {
        format: Format::Raw,
        file,
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let image = Image::open_chain(vec![layer], OpenOptions::default()).expect("open_chain");
    image.activate().expect("activate");
    Arc::new(image)
}

fn both(name: &str, flags: i32, check: impl Fn(&mut Disk)) {
    let scratch = Scratch::new(name);
    for uring in [true, false] {
        let mut file = File::create(&scratch.0).expect("create");
        file.write_all(&[7u8; 1 << 20]).expect("fill");
        let image = image(open(&scratch.0, flags));
        let mut disk = if uring {
            Disk::new(image)
        } else {
            Disk::blocking(image)
        }
        .expect("disk");
        check(&mut disk);
        disk.image().inactivate().expect("inactivate");
    }
}

#[test]
fn what_is_written_is_read_back_and_zeroed() {
    for flags in [0, libc::O_DIRECT] {
        both(&format!("rw{flags}"), flags, |disk| {
            let pattern: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
            disk.write(8192, &pattern[..12288]).expect("write");
            disk.flush().expect("flush");
            let mut back = vec![0; 12288];
            disk.read(8192, &mut back).expect("read");
            assert_eq!(back, pattern[..12288]);
            disk.write_zeroes(8192, 4096, true).expect("zero");
            disk.write_zeroes(12288, 4096, false).expect("zero");
            disk.read(8192, &mut back).expect("read");
            assert!(back[..8192].iter().all(|byte| *byte == 0));
            assert_eq!(back[8192..], pattern[8192..12288]);
        });
    }
}

#[test]
fn a_read_may_start_anywhere_with_direct_io() {
    both("odd", libc::O_DIRECT, |disk| {
        let mut back = vec![0; 1000];
        disk.read(777, &mut back).expect("read");
        assert!(back.iter().all(|byte| *byte == 7));
    });
}

#[test]
fn a_range_off_the_disk_is_refused() {
    both("range", 0, |disk| {
        let size = disk.image().size();
        let error = disk
            .read(size - 1, &mut [0; 2])
            .expect_err("beyond the end");
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert_eq!(
            disk.read(u64::MAX, &mut [0; 2])
                .expect_err("overflow")
                .kind(),
            Kind::InvalidArgument
        );
    });
}

#[test]
fn hundreds_of_requests_are_under_way_at_once() {
    let scratch = Scratch::new("many");
    File::create(&scratch.0)
        .and_then(|file| file.set_len(8 << 20))
        .expect("create");
    let image = image(open(&scratch.0, 0));
    let mut engine = Engine::uring(Ring::new(16, 4).expect("ring"));
    let slot = engine.attach(image).expect("attach");
    let mut data: Vec<Vec<u8>> = (0..500u32).map(|n| vec![n as u8; 4096]).collect();
    for (n, block) in data.iter_mut().enumerate() {
        let piece = libc::iovec {
            iov_base: block.as_mut_ptr().cast(),
            iov_len: 4096,
        };
        let op = Op::Write { fua: n % 50 == 0 };
        let request = Request {
            id: n as u64,
            op,
            offset: n as u64 * 4096,
            len: 4096,
            buffers: smallvec![piece],
        };
        // SAFETY: `data` outlives the loop below, which waits for all.
        unsafe { engine.submit(slot, request) };
    }
    let mut done: Vec<Completion> = Vec::new();
    while done.len() < 500 {
        let mut more = Vec::new();
        engine.wait(&mut more).expect("wait");
        done.append(&mut more);
    }
    assert!(done.iter().all(|completion| completion.result.is_ok()));
    let written = std::fs::read(&scratch.0).expect("read");
    assert!((0..500).all(|n| written[n * 4096..][..4096]
        .iter()
        .all(|byte| *byte == n as u8)));
    engine.detach(slot).expect("detach");
}

#[test]
fn an_image_in_use_is_refused() {
    let scratch = Scratch::new("lock");
    File::create(&scratch.0)
        .and_then(|file| file.set_len(4096))
        .expect("create");
    let first = image(open(&scratch.0, 0));
    let layer = |file| LayerFiles {
        format: Format::Raw,
        file,
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let second =
        Image::open_chain(vec![layer(open(&scratch.0, 0))], OpenOptions::default()).expect("open");
    assert_eq!(second.activate().expect_err("in use").kind(), Kind::InUse);
    first.inactivate().expect("inactivate");
    second.activate().expect("free now");
}

#[test]
fn a_restricted_ring_has_one_registration_left() {
    let ring = Ring::new(8, 2).expect("ring");
    // SAFETY: IORING_REGISTER_BUFFERS (0) with no buffers; the kernel must refuse the opcode itself.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.fd(),
            0,
            std::ptr::null::<u8>(),
            0,
        )
    };
    assert_eq!(
        (result, std::io::Error::last_os_error().raw_os_error()),
        (-1, Some(libc::EACCES))
    );
}
