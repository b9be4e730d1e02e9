// SPDX-License-Identifier: Apache-2.0
//! Images in memory: files that no file system ever sees.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmbus_qcow2::{Format, Image, LayerFiles, OpenOptions, Result};

/// Bytes of metadata that an image opened here caches.
pub const CACHE: usize = 8 << 20;

/// A file in memory with this content.
pub fn file(content: &[u8]) -> File {
    // SAFETY: a constant string; the flags take no pointer.
    let fd = unsafe { libc_memfd(c"fuzz".as_ptr(), 1) };
    assert!(fd >= 0, "memfd_create failed");
    // SAFETY: a descriptor that was just made and is nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all_at(content, 0).expect("write to memory");
    file
}

extern "C" {
    #[link_name = "memfd_create"]
    fn libc_memfd(name: *const std::ffi::c_char, flags: std::ffi::c_uint) -> std::ffi::c_int;
}

/// All that is in a file.
pub fn content(file: &File) -> Vec<u8> {
    let len = file.metadata().expect("fstat").len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).expect("read from memory");
    bytes
}

/// Open an image without a backing file, and activate it.
pub fn open(file: &File, format: Format, read_only: bool) -> Result<Arc<Image>> {
    let layer = LayerFiles {
        format,
        file: file.try_clone().expect("dup"),
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let options = OpenOptions {
        read_only,
        cache: CACHE,
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer], options)?;
    image.activate()?;
    Ok(Arc::new(image))
}
