// SPDX-License-Identifier: Apache-2.0
//! Requests in JSON: the fields that operations have in common, each typed or refused by its name, and the chain
//! that is to be opened. Files are fds, of which each use takes a copy.

use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use vmbus_qcow2::{EncryptOptions, Format, Image, LayerFiles, OpenOptions, Secret};

use super::Outcome;
use crate::error::Failure;

pub(super) fn open(request: &Value) -> Outcome<Arc<Image>> {
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

pub(super) fn parse(json: &[u8]) -> Outcome<Value> {
    serde_json::from_slice(json)
        .map_err(|e| Failure::about("InvalidArgument", "json", e.to_string()))
}

pub(super) fn text<'a>(request: &'a Value, key: &str) -> Outcome<&'a str> {
    request[key]
        .as_str()
        .ok_or_else(|| Failure::about("InvalidArgument", key, "a string is missing"))
}

pub(super) fn texts(request: &Value, key: &str) -> Vec<String> {
    let listed = request[key].as_array().into_iter().flatten();
    listed
        .filter_map(|one| one.as_str().map(str::to_owned))
        .collect()
}

pub(super) fn number(request: &Value, key: &str) -> Outcome<u64> {
    request[key]
        .as_u64()
        .ok_or_else(|| Failure::about("InvalidArgument", key, "a number is missing"))
}

pub(super) fn flag(request: &Value, key: &str) -> bool {
    request[key].as_bool().unwrap_or(false)
}

pub(super) fn format(request: &Value) -> Outcome<Format> {
    Ok(text(request, "format")?.parse()?)
}

/// A passphrase, read to the end of the file or pipe that the request names: it never stands in JSON.
pub(super) fn secret(request: &Value, key: &str) -> Outcome<Option<Secret>> {
    if request[key].is_null() {
        return Ok(None);
    }
    Ok(Some(Secret::read(file(request, key)?)?))
}

pub(super) fn needed_secret(request: &Value, key: &str) -> Outcome<Secret> {
    let missing = || Failure::about("InvalidArgument", key, "a passphrase is needed");
    secret(request, key)?.ok_or_else(missing)
}

pub(super) fn iteration_time(request: &Value) -> Duration {
    Duration::from_millis(request["iter_time"].as_u64().unwrap_or(2000))
}

pub(super) fn encryption(request: &Value) -> Outcome<Option<EncryptOptions>> {
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

/// A duplicate of the caller's fd; the caller's own stays open and its own.
pub(super) fn file(request: &Value, key: &str) -> Outcome<File> {
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
