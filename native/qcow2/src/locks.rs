// SPDX-License-Identifier: Apache-2.0
//! The locks that QEMU puts on images, so that each refuses what the other has in use.
//!
//! QEMU (block/file-posix.c) describes a use of a file by the permissions it holds and those it
//! leaves to others. Each held permission n is a shared OFD lock on byte 100 + n, each permission
//! *denied* to others one on byte 200 + n. A use is refused when somebody denies what it needs or
//! holds what it denies. The locks are advisory, and belong to the open file description: whoever
//! shares a passed fd shares them.

use std::io;
use std::os::fd::RawFd;

use crate::error::{Error, Kind, Result};

const HELD: i64 = 100;
const DENIED: i64 = 200;

/// BLK_PERM_* of QEMU's include/block/block-common.h, as bit numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How an image file is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// Read; others may read too.
    Read,
    /// Written and resized; others may not open it without --force-share.
    Write,
}

impl Use {
    fn held(self) -> &'static [i64] {
        match self {
            Use::Read => &[CONSISTENT_READ],
            Use::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn denied(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// Take the locks of `usage`, or none and `InUse`.
pub(crate) fn lock(fd: RawFd, usage: Use) -> Result<()> {
    let bytes = usage
        .held()
        .iter()
        .map(|n| HELD + n)
        .chain(usage.denied().iter().map(|n| DENIED + n));
    for byte in bytes {
        set(fd, byte, libc::F_RDLCK).map_err(|e| refused(fd, &e))?;
    }
    let conflicts = usage
        .held()
        .iter()
        .map(|n| DENIED + n)
        .chain(usage.denied().iter().map(|n| HELD + n));
    for byte in conflicts {
        match locked_by_another(fd, byte) {
            Ok(false) => {}
            Ok(true) => {
                unlock(fd);
                let what = if usage == Use::Write {
                    "write"
                } else {
                    "shared \"write\""
                };
                return Err(Error::new(
                    Kind::InUse,
                    format!("another process uses this image: failed to get {what} lock"),
                ));
            }
            Err(e) => return Err(refused(fd, &e)),
        }
    }
    Ok(())
}

/// Drop all locks of [`lock`].
pub(crate) fn unlock(fd: RawFd) {
    for byte in [HELD, DENIED] {
        // Unlocking cannot conflict; if the file is gone, so are its locks.
        let _ = command(fd, libc::F_OFD_SETLK, &mut range(byte, 8, libc::F_UNLCK));
    }
}

fn refused(fd: RawFd, error: &io::Error) -> Error {
    unlock(fd);
    Error::io("lock the image", error)
}

fn range(start: i64, len: i64, kind: i32) -> libc::flock64 {
    libc::flock64 {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn set(fd: RawFd, byte: i64, kind: i32) -> io::Result<()> {
    command(fd, libc::F_OFD_SETLK, &mut range(byte, 1, kind))
}

fn locked_by_another(fd: RawFd, byte: i64) -> io::Result<bool> {
    let mut probe = range(byte, 1, libc::F_WRLCK);
    command(fd, libc::F_OFD_GETLK, &mut probe)?;
    Ok(i32::from(probe.l_type) != libc::F_UNLCK)
}

fn command(fd: RawFd, command: i32, lock: &mut libc::flock64) -> io::Result<()> {
    // SAFETY: the struct is valid for the call and exclusively ours.
    if unsafe { libc::fcntl(fd, command, std::ptr::from_mut(lock)) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions as FileOptions};
    use std::os::fd::AsRawFd;
    use std::path::Path;

    use super::{lock, unlock, Use};
    use crate::{create_qcow2, CreateOptions, Error, Format, Image, Kind, LayerFiles, OpenOptions};

    fn open(path: &Path) -> File {
        FileOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap()
    }

    #[test]
    fn an_image_that_could_not_be_let_go_is_locked_until_it_is_closed() {
        let path = std::env::temp_dir().join(format!("vmbus-locked-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        create_qcow2(&open(&path), None, &CreateOptions::default()).unwrap();
        // Its other holder keeps the open file description, and so its locks, beyond the image's end.
        let shared = open(&path);
        let other = open(&path);
        let free = || {
            let refused = lock(other.as_raw_fd(), Use::Write).err();
            unlock(other.as_raw_fd());
            refused.is_none_or(|error| {
                assert_eq!(error.kind(), Kind::InUse);
                false
            })
        };
        let image = || {
            let layer = LayerFiles {
                format: Format::Qcow2,
                file: shared.try_clone().unwrap(),
                data_file: None,
                backing_name: None,
                data_name: None,
                secret: None,
            };
            Image::open_chain(vec![layer], OpenOptions::default()).unwrap()
        };
        let lost = image();
        lost.activate().unwrap();
        lost.durable_write_failed(&Error::os("write", libc::EIO));
        assert!(lost.inactivate().is_err() && lost.active() && !free());
        assert!(lost.close().is_err() && !lost.active() && free());
        lost.activate().unwrap();
        lost.inactivate().unwrap();
        let dropped = image();
        dropped.activate().unwrap();
        assert!(!free());
        drop(dropped);
        assert!(free());
        std::fs::remove_file(&path).unwrap();
    }
}
