// SPDX-License-Identifier: Apache-2.0
//! Images for Python (`vmbus.image`): opened chains as handles, and operations on whole images by
//! name. Files cross as fds, which stay the caller's; everything else crosses as JSON.

mod answer;
mod operations;
mod request;

use std::ffi::{c_char, c_int, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmbus_qcow2::{Disk, Error, Image, Progress};

use crate::error::{borrowed, guard, Failure};
use operations::perform;
use request::{open, parse};

type Outcome<T> = Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new(error.kind().wire_name(), error.message())
    }
}

/// An opened, active image.
pub struct VmbusImage {
    image: Arc<Image>,
    disk: Mutex<Disk>,
}

/// Open and activate a chain. JSON: `layers` (each with `fd`, `format`, and where it has them
/// `backing_name`, `data_fd`, `data_name`, `secret_fd`), `read_only`, `locks`, `sync`, `discard`, `cache` (bytes), `snapshot`,
/// `detect_zeroes`.
///
/// # Safety
/// `json` points to `len` bytes, `out` to room for a handle.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_open(
    json: *const u8,
    len: usize,
    out: *mut *mut VmbusImage,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let request = parse(unsafe { borrowed(json, len) })?;
        let image = open(&request)?;
        let disk = Mutex::new(Disk::new(image.clone())?);
        // SAFETY: the caller's promise.
        unsafe { *out = Box::into_raw(Box::new(VmbusImage { image, disk })) };
        Ok(0)
    })
}

/// Write everything back and free the handle; an error means that something may not be on the disk.
///
/// # Safety
/// `image` is a handle of `vmbus_image_open`, and not used any more.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_close(image: *mut VmbusImage) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let image = unsafe { Box::from_raw(image) };
        image.image.close()?;
        Ok(0)
    })
}

/// The disk's size in bytes.
///
/// # Safety
/// `image` is a live handle.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_size(image: *const VmbusImage) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { &*image }.image.size()
}

/// Fill `data` from byte `offset` of the disk.
///
/// # Safety
/// `image` is a live handle, `data` points to `len` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_read(
    image: *const VmbusImage,
    offset: u64,
    data: *mut u8,
    len: usize,
) -> c_int {
    guard(|| {
        let data = if len == 0 {
            &mut [][..]
        } else {
            // SAFETY: the caller's promise.
            unsafe { std::slice::from_raw_parts_mut(data, len) }
        };
        // SAFETY: the caller's promise.
        unsafe { &*image }.disk().read(offset, data)?;
        Ok(0)
    })
}

/// Write `data` at byte `offset` of the disk.
///
/// # Safety
/// `image` is a live handle, `data` points to `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_write(
    image: *const VmbusImage,
    offset: u64,
    data: *const u8,
    len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let data = unsafe { borrowed(data, len) };
        // SAFETY: the caller's promise.
        unsafe { &*image }.disk().write(offset, data)?;
        Ok(0)
    })
}

/// What `vmbus_image_range` does to a range.
const DISCARD: u32 = 0;
const ZERO: u32 = 1;
const ZERO_AND_UNMAP: u32 = 2;

/// Discard a range (0), make it zeros (1), or the same and give its space back (2).
///
/// # Safety
/// `image` is a live handle.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_range(
    image: *const VmbusImage,
    what: u32,
    offset: u64,
    len: u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let mut disk = unsafe { &*image }.disk();
        match what {
            DISCARD => disk.discard(offset, len)?,
            ZERO => disk.write_zeroes(offset, len, false)?,
            ZERO_AND_UNMAP => disk.write_zeroes(offset, len, true)?,
            _ => {
                return Err(Failure::about(
                    "InvalidArgument",
                    "what",
                    "not an operation on ranges",
                ))
            }
        }
        Ok(0)
    })
}

/// Make all writes durable.
///
/// # Safety
/// `image` is a live handle.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_flush(image: *const VmbusImage) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { &*image }.disk().flush()?;
        Ok(0)
    })
}

/// Carry out the operation that the JSON names (`op`), on `image` and perhaps `other` (null where
/// the operation needs none), and give its result as JSON, to be freed with `vmbus_image_free_text`. `progress`, if
/// not null, points to three numbers: bytes done and in all, written now and then, and a wish to
/// cancel, read now and then.
///
/// # Safety
/// The handles are live, `json` points to `len` bytes, `progress` to three numbers that live as long as the call.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_call(
    image: *const VmbusImage,
    other: *const VmbusImage,
    json: *const u8,
    len: usize,
    progress: *const u64,
    out: *mut *mut c_char,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let request = parse(unsafe { borrowed(json, len) })?;
        // SAFETY: the caller's promise: null or live.
        let (image, other) = unsafe { (image.as_ref(), other.as_ref()) };
        let of = |handle: Option<&VmbusImage>| handle.map(|handle| handle.image.clone());
        let (image, other) = (of(image), of(other));
        // SAFETY: null or three aligned numbers that only atomics touch while the call lasts.
        let shared = unsafe { progress.cast::<[AtomicU64; 3]>().as_ref() };
        let result = with_progress(shared, |progress| perform(&request, image, other, progress))?;
        let text = CString::new(result.to_string())
            .map_err(|_| Failure::new("Internal", "NUL in a result"))?;
        // SAFETY: the caller's promise.
        unsafe { *out = text.into_raw() };
        Ok(0)
    })
}

/// Free a result of `vmbus_image_call`.
///
/// # Safety
/// `text` is such a result, and not used any more.
#[no_mangle]
pub unsafe extern "C" fn vmbus_image_free_text(text: *mut c_char) {
    // SAFETY: the caller's promise.
    drop(unsafe { CString::from_raw(text) });
}

impl VmbusImage {
    fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Mirror the progress of `body` into memory shared with the caller.
fn with_progress<T: Send>(
    shared: Option<&[AtomicU64; 3]>,
    body: impl FnOnce(&Progress) -> Outcome<T> + Send,
) -> Outcome<T> {
    let progress = Progress::default();
    let Some([done, total, cancel]) = shared else {
        return body(&progress);
    };
    std::thread::scope(|scope| {
        let running = scope.spawn(|| body(&progress));
        while !running.is_finished() {
            done.store(progress.done.load(Ordering::Relaxed), Ordering::Relaxed);
            total.store(progress.total.load(Ordering::Relaxed), Ordering::Relaxed);
            progress
                .cancel
                .store(cancel.load(Ordering::Relaxed) != 0, Ordering::Relaxed);
            std::thread::park_timeout(Duration::from_millis(2));
        }
        done.store(progress.done.load(Ordering::Relaxed), Ordering::Relaxed);
        running
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
