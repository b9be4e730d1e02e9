// SPDX-License-Identifier: Apache-2.0
//! Images for Python (`vmbus.image`): opened chains as handles, and operations on whole images by
//! name. Files cross as fds, which stay the caller's; everything else crosses as JSON.

use std::ffi::{c_char, c_int, CString};
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{json, Value};
use vmbus_qcow2::{
    amend as amend_options, amend_keys, bench, bitmaps, check_within, commit_into, compare, copy,
    create_qcow2, empty, first_nonzero, info, looks_like_qcow2, range_at, rebase, resize_with,
    serve, set_backing, set_refcount_bits, snapshot, AmendOptions, BenchOptions, Bitmap,
    BitmapView, CheckReport, CopyOptions, CreateOptions, Disk, EncryptOptions, Encryption, Error,
    Format, Image, ImageInfo, KeyChange, LayerFiles, OpenOptions, Preallocation, Progress, Repair,
    Secret, ServeOptions, Snapshot, CHECK_MEMORY,
};

use crate::error::{borrowed, guard, Failure};

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
        image.image.inactivate()?;
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

fn perform(
    request: &Value,
    image: Option<Arc<Image>>,
    other: Option<Arc<Image>>,
    progress: &Progress,
) -> Outcome<Value> {
    let needed = |handle: &Option<Arc<Image>>| {
        let missing = || Failure::about("InvalidArgument", "image", "an image is needed");
        handle.clone().ok_or_else(missing)
    };
    match text(request, "op")? {
        "probe" => Ok(json!(if looks_like_qcow2(&file(request, "fd")?) {
            "qcow2"
        } else {
            "raw"
        })),
        "create" => create(request),
        "info" => {
            let mut found = info(
                &file(request, "fd")?,
                format(request)?,
                flag(request, "lock"),
            )?;
            if let Some(qcow2) = found.qcow2.as_mut().filter(|_| !flag(request, "snapshots")) {
                // There may be 65,535 of them, for which not everybody asks.
                qcow2.snapshots = Vec::new();
            }
            Ok(describe(&found))
        }
        "check" => {
            let repair = match text(request, "repair")? {
                "none" => Repair::None,
                "leaks" => Repair::Leaks,
                "all" => Repair::All,
                _ => {
                    return Err(Failure::about(
                        "InvalidArgument",
                        "repair",
                        "none, leaks or all",
                    ))
                }
            };
            let memory = request["memory"].as_u64().map(usize::try_from);
            let memory = memory.and_then(Result::ok).unwrap_or(CHECK_MEMORY);
            Ok(report(&check_within(
                &file(request, "fd")?,
                repair,
                flag(request, "lock"),
                memory,
            )?))
        }
        "amend-keys" => amend(request),
        "set-backing" => {
            let name = request["backing_name"].as_str();
            let format = request["backing_format"]
                .as_str()
                .map(str::parse)
                .transpose()?;
            set_backing(&file(request, "fd")?, name.map(|name| (name, format)))?;
            Ok(Value::Null)
        }
        "resize" => {
            resize_with(
                &*needed(&image)?,
                number(request, "size")?,
                flag(request, "shrink"),
                preallocation(request)?,
            )?;
            Ok(Value::Null)
        }
        "empty" => {
            empty(&*needed(&image)?)?;
            Ok(Value::Null)
        }
        "commit-into" => {
            let (overlay, target) = (needed(&image)?, needed(&other)?);
            let options = CopyOptions {
                rate: request["rate"].as_u64().unwrap_or(0),
                ..CopyOptions::default()
            };
            let depth = number(request, "depth")? as usize;
            commit_into(&overlay, &target, depth, &options, progress)?;
            Ok(Value::Null)
        }
        "rebase" => {
            let options = CopyOptions {
                compress: flag(request, "compress"),
                ..CopyOptions::default()
            };
            rebase(&needed(&image)?, other.as_ref(), &options, progress)?;
            Ok(Value::Null)
        }
        "map" => map(&needed(&image)?, request),
        "amend-options" => {
            let options = AmendOptions {
                version: request["version"].as_u64().map(|n| n as u32),
                lazy_refcounts: request["lazy_refcounts"].as_bool(),
                data_name: request["data_name"].as_str().map(str::to_owned),
                data_raw: request["data_raw"].as_bool(),
            };
            amend_options(&needed(&image)?, &options)?;
            Ok(Value::Null)
        }
        "set-refcount-bits" => {
            set_refcount_bits(&file(request, "fd")?, number(request, "bits")? as u32)?;
            Ok(Value::Null)
        }
        "bitmap-list" => Ok(bitmaps::list(&*needed(&image)?)?
            .iter()
            .map(bitmap_json)
            .collect()),
        "bitmap-add" => {
            let image = needed(&image)?;
            let granularity = match request["granularity"].as_u64() {
                Some(granularity) => granularity,
                None => bitmaps::default_granularity(&image)?,
            };
            let (name, enabled) = (text(request, "name")?, flag(request, "enabled"));
            bitmaps::add(&image, name, granularity, enabled)?;
            Ok(Value::Null)
        }
        "bitmap-remove" => {
            bitmaps::remove(&*needed(&image)?, text(request, "name")?)?;
            Ok(Value::Null)
        }
        "bitmap-clear" => {
            bitmaps::clear(&*needed(&image)?, text(request, "name")?)?;
            Ok(Value::Null)
        }
        "bitmap-enable" => {
            let name = text(request, "name")?;
            bitmaps::set_enabled(&*needed(&image)?, name, flag(request, "enabled"))?;
            Ok(Value::Null)
        }
        "bitmap-merge" => {
            let into = needed(&image)?;
            let from = other.unwrap_or_else(|| into.clone());
            bitmaps::merge(
                &into,
                text(request, "name")?,
                &from,
                text(request, "source")?,
            )?;
            Ok(Value::Null)
        }
        "bitmap-ranges" => bitmap_ranges(&needed(&image)?, request),
        "snapshot-list" => Ok(snapshot::list(&*needed(&image)?)?
            .iter()
            .map(snapshot_json)
            .collect()),
        "snapshot-create" => Ok(snapshot_json(&snapshot::create(
            &*needed(&image)?,
            text(request, "name")?,
        )?)),
        "snapshot-delete" => {
            snapshot::delete(&*needed(&image)?, text(request, "name")?)?;
            Ok(Value::Null)
        }
        "snapshot-apply" => {
            snapshot::apply(&*needed(&image)?, text(request, "name")?)?;
            Ok(Value::Null)
        }
        "copy" => {
            let mut options = CopyOptions {
                compress: flag(request, "compress"),
                target_is_zero: flag(request, "target_is_zero"),
                above: request["above"].as_u64().map(|above| above as usize),
                salvage: flag(request, "salvage"),
                rate: request["rate"].as_u64().unwrap_or(0),
                shift: request["shift"].as_u64().unwrap_or(0),
                ..CopyOptions::default()
            };
            if let Some(sparse) = request["sparse"].as_u64() {
                options.sparse = sparse;
            }
            if let Some(threads) = request["threads"].as_u64() {
                options.threads = threads as usize;
            }
            let lost = copy(&needed(&image)?, &needed(&other)?, &options, progress)?;
            Ok(json!(lost))
        }
        "bench" => {
            let image = needed(&image)?;
            let options = BenchOptions {
                count: number(request, "count")?,
                depth: number(request, "depth")?,
                size: number(request, "size")?,
                offset: number(request, "offset")?,
                step: number(request, "step")?,
                random: flag(request, "random"),
                write: flag(request, "write"),
                pattern: number(request, "pattern")? as u8,
                fua: flag(request, "fua"),
                flush_interval: number(request, "flush_interval")?,
            };
            Ok(json!(bench(&image, &options)?.as_secs_f64()))
        }
        "serve" => {
            let listener = UnixListener::from(OwnedFd::from(file(request, "fd")?));
            let options = ServeOptions {
                export: text(request, "export")?.to_owned(),
                persistent: flag(request, "persistent"),
                connections: number(request, "connections")? as usize,
                bitmaps: texts(request, "bitmaps"),
            };
            serve(&needed(&image)?, &listener, &options, &progress.cancel)?;
            Ok(Value::Null)
        }
        "compare" => Ok(json!(compare(
            &needed(&image)?,
            &needed(&other)?,
            CopyOptions::default().threads,
            progress
        )?)),
        "first-nonzero" => Ok(json!(first_nonzero(
            &needed(&image)?,
            number(request, "start")?,
            number(request, "end")?
        )?)),
        op => Err(Failure::about(
            "InvalidArgument",
            "op",
            format!("no operation '{op}'"),
        )),
    }
}

fn preallocation(request: &Value) -> Outcome<Preallocation> {
    match request["preallocation"].as_str().unwrap_or("off") {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        _ => Err(Failure::about(
            "InvalidArgument",
            "preallocation",
            "off, metadata, falloc or full",
        )),
    }
}

fn create(request: &Value) -> Outcome<Value> {
    let backing = match (
        request["backing_name"].as_str(),
        request["backing_format"].as_str(),
    ) {
        (Some(name), Some(format)) => Some((name.to_owned(), format.parse()?)),
        (None, _) => None,
        (Some(_), None) => {
            return Err(Failure::about(
                "InvalidArgument",
                "backing_format",
                "must be stated",
            ))
        }
    };
    let defaults = CreateOptions::default();
    let options = CreateOptions {
        size: number(request, "size")?,
        version: request["version"]
            .as_u64()
            .map_or(defaults.version, |n| n as u32),
        cluster_size: request["cluster_size"]
            .as_u64()
            .unwrap_or(defaults.cluster_size),
        refcount_bits: request["refcount_bits"]
            .as_u64()
            .map_or(defaults.refcount_bits, |n| n as u32),
        lazy_refcounts: flag(request, "lazy_refcounts"),
        extended_l2: flag(request, "extended_l2"),
        zstd: flag(request, "zstd"),
        backing,
        data_name: request["data_name"].as_str().map(str::to_owned),
        data_raw: flag(request, "data_raw"),
        preallocation: preallocation(request)?,
        encryption: encryption(&request["encrypt"])?,
    };
    let data = if request["data_fd"].is_null() {
        None
    } else {
        Some(file(request, "data_fd")?)
    };
    create_qcow2(&file(request, "fd")?, data.as_ref(), &options)?;
    Ok(Value::Null)
}

fn map(image: &Arc<Image>, request: &Value) -> Outcome<Value> {
    let mut at = request["start"].as_u64().unwrap_or(0);
    let end = request["end"]
        .as_u64()
        .unwrap_or(u64::MAX)
        .min(image.size());
    let mut ranges = Vec::new();
    // A bounded number: the caller asks again from where this ends.
    while at < end && ranges.len() < 4096 {
        let range = range_at(image, at, end - at)?;
        let mut entry = json!({
            "start": range.start, "length": range.len, "depth": range.depth, "present": range.present,
            "zero": range.zero, "data": range.data, "compressed": range.compressed,
        });
        if let Some(offset) = range.offset {
            entry["offset"] = json!(offset);
        }
        ranges.push(entry);
        at = range.start + range.len;
    }
    Ok(Value::Array(ranges))
}

fn describe(info: &ImageInfo) -> Value {
    // QEMU counts a file's bytes in sectors.
    let mut value = json!({
        "virtual-size": info.size, "actual-size": info.allocated,
        "file-size": info.file_len.next_multiple_of(512), "regular": info.regular,
    });
    if let Some(qcow2) = &info.qcow2 {
        value["qcow2"] = json!({
            "version": qcow2.version, "cluster-size": qcow2.cluster_size, "refcount-bits": qcow2.refcount_bits,
            "compression-type": if qcow2.zstd { "zstd" } else { "zlib" }, "lazy-refcounts": qcow2.lazy_refcounts,
            "extended-l2": qcow2.extended_l2,
            "dirty": qcow2.dirty, "corrupt": qcow2.corrupt, "backing-name": qcow2.backing_name,
            "backing-format": qcow2.backing_format, "data-name": qcow2.data_name, "data-raw": qcow2.data_raw,
            "encrypt": qcow2.encryption.as_ref().map(encryption_json),
            "bitmaps": qcow2.bitmaps.iter().map(bitmap_json).collect::<Vec<_>>(),
            "snapshots": qcow2.snapshots.iter().map(snapshot_json).collect::<Vec<_>>(),
        });
    }
    value
}

/// With qemu-img's keys.
fn encryption_json(encryption: &Encryption) -> Value {
    let luks = match encryption {
        Encryption::Aes => return json!({"format": "aes"}),
        Encryption::Luks(luks) => luks,
    };
    let slot = |(iterations, offset): &(Option<u32>, u64)| match iterations {
        Some(count) => json!({
            "active": true, "iters": count, "key-offset": offset, "stripes": luks.stripes,
        }),
        None => json!({"active": false, "key-offset": offset}),
    };
    let mut value = json!({
        "format": "luks", "cipher-alg": luks.cipher, "cipher-mode": luks.mode, "ivgen-alg": luks.iv,
        "hash-alg": luks.hash, "uuid": luks.uuid, "detached-header": false,
        "payload-offset": luks.payload_offset, "master-key-iters": luks.iterations,
        "slots": luks.slots.iter().map(slot).collect::<Vec<_>>(),
    });
    if let Some(hash) = &luks.iv_hash {
        value["ivgen-hash-alg"] = json!(hash);
    }
    value
}

fn bitmap_json(bitmap: &Bitmap) -> Value {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.enabled)];
    let set: Vec<&str> = flags
        .iter()
        .filter_map(|(name, on)| on.then_some(*name))
        .collect();
    json!({ "flags": set, "name": bitmap.name, "granularity": bitmap.granularity })
}

/// Ranges of the disk that a bitmap has as dirty: start and length of each. A bounded number: the caller asks
/// again from `next`.
fn bitmap_ranges(image: &Arc<Image>, request: &Value) -> Outcome<Value> {
    let mut view = BitmapView::open(image, text(request, "name")?)?;
    let mut at = number(request, "start")?;
    let end = number(request, "end")?.min(image.size());
    let mut ranges = Vec::new();
    while at < end && ranges.len() < 4096 {
        let (dirty, len) = view.status(image, at, end - at)?;
        if dirty {
            ranges.push(json!([at, len]));
        }
        at += len;
    }
    Ok(json!({ "ranges": ranges, "next": at }))
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut value = json!({
        "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0, "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000, "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = snapshot.icount {
        value["icount"] = json!(icount);
    }
    value
}

fn report(report: &CheckReport) -> Value {
    json!({
        "image-end-offset": report.image_end, "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters, "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters, "corruptions": report.corruptions, "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed, "leaks-fixed": report.leaks_fixed, "messages": report.messages,
    })
}

fn open(request: &Value) -> Outcome<Arc<Image>> {
    let mut layers = Vec::new();
    let listed = request["layers"]
        .as_array()
        .ok_or_else(|| Failure::about("InvalidArgument", "layers", "must be a list"))?;
    for layer in listed {
        layers.push(LayerFiles {
            format: format(layer)?,
            file: file(layer, "fd")?,
            data_file: if layer["data_fd"].is_null() {
                None
            } else {
                Some(file(layer, "data_fd")?)
            },
            backing_name: layer["backing_name"].as_str().map(str::to_owned),
            data_name: layer["data_name"].as_str().map(str::to_owned),
            secret: secret(layer, "secret_fd")?,
        });
    }
    let defaults = OpenOptions::default();
    let options = OpenOptions {
        read_only: flag(request, "read_only"),
        discard: request["discard"].as_bool().unwrap_or(true),
        sync: request["sync"].as_bool().unwrap_or(true),
        locks: request["locks"].as_bool().unwrap_or(true),
        cache: request["cache"]
            .as_u64()
            .map_or(defaults.cache, |bytes| bytes as usize),
        snapshot: request["snapshot"].as_str().map(str::to_owned),
        detect_zeroes: match request["detect_zeroes"].as_str() {
            Some(name) => name.parse()?,
            None => defaults.detect_zeroes,
        },
    };
    let image = Image::open_chain(layers, options)?;
    image.activate()?;
    Ok(Arc::new(image))
}

fn parse(json: &[u8]) -> Outcome<Value> {
    serde_json::from_slice(json)
        .map_err(|e| Failure::about("InvalidArgument", "json", e.to_string()))
}

fn text<'a>(request: &'a Value, key: &str) -> Outcome<&'a str> {
    request[key]
        .as_str()
        .ok_or_else(|| Failure::about("InvalidArgument", key, "a string is missing"))
}

fn texts(request: &Value, key: &str) -> Vec<String> {
    let listed = request[key].as_array().into_iter().flatten();
    listed
        .filter_map(|one| one.as_str().map(str::to_owned))
        .collect()
}

fn number(request: &Value, key: &str) -> Outcome<u64> {
    request[key]
        .as_u64()
        .ok_or_else(|| Failure::about("InvalidArgument", key, "a number is missing"))
}

fn flag(request: &Value, key: &str) -> bool {
    request[key].as_bool().unwrap_or(false)
}

fn format(request: &Value) -> Outcome<Format> {
    Ok(text(request, "format")?.parse()?)
}

/// A passphrase, read to the end of the file or pipe that the request names: it never stands in JSON.
fn secret(request: &Value, key: &str) -> Outcome<Option<Secret>> {
    if request[key].is_null() {
        return Ok(None);
    }
    Ok(Some(Secret::read(file(request, key)?)?))
}

fn needed_secret(request: &Value, key: &str) -> Outcome<Secret> {
    let missing = || Failure::about("InvalidArgument", key, "a passphrase is needed");
    secret(request, key)?.ok_or_else(missing)
}

fn iteration_time(request: &Value) -> Duration {
    Duration::from_millis(request["iter_time"].as_u64().unwrap_or(2000))
}

fn encryption(request: &Value) -> Outcome<Option<EncryptOptions>> {
    if request.is_null() {
        return Ok(None);
    }
    let name = |key: &str| request[key].as_str().map(str::to_owned);
    Ok(Some(EncryptOptions {
        cipher: name("cipher"),
        mode: name("mode"),
        iv: name("ivgen"),
        iv_hash: name("ivgen_hash"),
        hash: name("hash"),
        iteration_time: iteration_time(request),
        ..EncryptOptions::new(needed_secret(request, "secret_fd")?)
    }))
}

/// Add or erase key slots.
fn amend(request: &Value) -> Outcome<Value> {
    let slot = request["slot"].as_u64().map(|slot| slot as usize);
    let change = match text(request, "change")? {
        "add" => KeyChange::Add {
            secret: needed_secret(request, "new_secret_fd")?,
            slot,
            iteration_time: iteration_time(request),
        },
        "erase" => match slot {
            Some(slot) => KeyChange::Erase { slot },
            None => KeyChange::EraseMatching {
                secret: needed_secret(request, "old_secret_fd")?,
            },
        },
        _ => return Err(Failure::about("InvalidArgument", "change", "add or erase")),
    };
    let secret = needed_secret(request, "secret_fd")?;
    amend_keys(
        &file(request, "fd")?,
        &secret,
        &change,
        flag(request, "force"),
    )?;
    Ok(Value::Null)
}

/// A duplicate of the caller's fd; the caller's own stays open and its own.
fn file(request: &Value, key: &str) -> Outcome<File> {
    let fd = number(request, key)?;
    let fd =
        RawFd::try_from(fd).map_err(|_| Failure::about("InvalidArgument", key, "not an fd"))?;
    // SAFETY: the fd is only duplicated; if it is not open the kernel says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let owned = borrowed.try_clone_to_owned();
    owned
        .map(File::from)
        .map_err(|e| Failure::about("InvalidArgument", key, e.to_string()))
}
