// SPDX-License-Identifier: Apache-2.0
//! The operations on whole images that `vmbus_image_call` knows by name: what the request says is taken apart
//! here, and the engine asked.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use serde_json::{json, Value};
use vmbus_qcow2::{
    amend as amend_options, amend_keys, bench, bitmaps, check_within, commit_into, compare, copy,
    create_qcow2, empty, first_nonzero, info, looks_like_qcow2, range_at, rebase, resize_with,
    serve, set_backing, set_refcount_bits, snapshot, AmendOptions, BenchOptions, BitmapView,
    CopyOptions, CreateOptions, Image, KeyChange, Preallocation, Progress, Repair, ServeOptions,
    CHECK_MEMORY,
};

use super::answer::{bitmap_json, describe, report, snapshot_json};
use super::request::{
    encryption, file, flag, format, iteration_time, needed_secret, number, text, texts,
};
use super::Outcome;
use crate::error::Failure;

/// Threads of a server that help its clients' own.
const MOST_HELPERS: usize = 15;

pub(super) fn perform(
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
                // The clients' own threads have one of the processors.
                helpers: std::thread::available_parallelism()
                    .map_or(0, |all| all.get() - 1)
                    .min(MOST_HELPERS),
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

pub(super) fn preallocation(request: &Value) -> Outcome<Preallocation> {
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

pub(super) fn create(request: &Value) -> Outcome<Value> {
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

pub(super) fn map(image: &Arc<Image>, request: &Value) -> Outcome<Value> {
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

/// Ranges of the disk that a bitmap has as dirty: start and length of each. A bounded number: the caller asks
/// again from `next`.
pub(super) fn bitmap_ranges(image: &Arc<Image>, request: &Value) -> Outcome<Value> {
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

/// Add or erase key slots.
pub(super) fn amend(request: &Value) -> Outcome<Value> {
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
