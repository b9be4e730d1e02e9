// SPDX-License-Identifier: Apache-2.0
//! Internal snapshots of a machine's disks: of all that can be written to, or of none.
//!
//! The machine's memory lies in a file of its own ([`crate::save`]); what lies on its disks stays in them, as internal snapshots of
//! one name, which no other program's have. Disks that are read-only are left out: they do not change.
//!
//! | operation | on each disk | if one fails |
//! |---|---|---|
//! | take | a snapshot | those taken are dropped |
//! | go back | it is looked for everywhere; a snapshot *aside* of what is there; then back | back to *aside*, which is dropped |
//! | tidy | *undo*: back to it and drop it, where it is; *drop*: drop it, where it is | the others are tried all the same |
//!
//! Each step on one disk is whole or has not happened, even if the power fails (`vmbus_qcow2::snapshot`). What a killed process
//! leaves between two disks is mended by whoever knows the names, with *tidy*, which can be done again and again: a
//! taken snapshot that nobody knows of is dropped; a half-done way back is undone.
//!
//! Called with disks that are taken up and have no request under way.

use std::sync::Arc;

use vmbus_qcow2::{snapshot, Image};

use crate::block::error_of;
use crate::device::Device;
use crate::error::{Error, Kind, Result};

/// What is done with the internal snapshot of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark<'a> {
    /// There could be one.
    Check,
    /// Take it.
    Take(&'a str),
    /// It has to be there.
    Find(&'a str),
    /// Go back to it.
    GoBack(&'a str),
    /// Delete it if it is there.
    Drop(&'a str),
    /// If it is there, go back to it and delete it.
    Undo(&'a str),
}

/// What is left of operations that were broken off.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tidy {
    /// Snapshots aside of ways back that were not finished.
    pub undo: Vec<String>,
    /// Snapshots that nobody wants.
    pub drop: Vec<String>,
}

type Devices = [Arc<dyn Device>];

/// Whether every disk can have one.
///
/// # Errors
/// `NotSupported`, by the id of one that cannot.
pub fn check(devices: &Devices) -> Result<()> {
    let mut all = devices.iter();
    all.try_for_each(|device| device.mark(Mark::Check))
}

/// Takes a snapshot of every disk.
///
/// # Errors
/// What one says, by its id; then none has it.
pub fn take(devices: &Devices, name: &str) -> Result<()> {
    let taken = devices
        .iter()
        .try_for_each(|device| device.mark(Mark::Take(name)));
    taken.map_err(|error| match each(devices, Mark::Drop(name)) {
        Ok(()) => error,
        Err(also) => and(&error, &also),
    })
}

/// Goes back to a snapshot on every disk, and leaves what was there before in one `aside`.
///
/// # Errors
/// What one says, by its id; then all are as they were.
pub fn go_back(devices: &Devices, to: &str, aside: &str) -> Result<()> {
    devices
        .iter()
        .try_for_each(|device| device.mark(Mark::Find(to)))?;
    take(devices, aside)?;
    let back = devices
        .iter()
        .try_for_each(|device| device.mark(Mark::GoBack(to)));
    back.map_err(|error| undone(devices, aside, error))
}

/// Undoes a way back after this error.
pub fn undone(devices: &Devices, aside: &str, error: Error) -> Error {
    match each(devices, Mark::Undo(aside)) {
        Ok(()) => error,
        Err(also) => and(&error, &also),
    }
}

/// Removes what operations that were broken off have left.
///
/// # Errors
/// The first that a disk says, by its id; all were tried.
pub fn tidy(devices: &Devices, what: &Tidy) -> Result<()> {
    let undo = what.undo.iter().map(|name| Mark::Undo(name));
    let drop = what.drop.iter().map(|name| Mark::Drop(name));
    let all = undo.chain(drop).map(|mark| each(devices, mark));
    all.fold(Ok(()), Result::and)
}

/// On each disk, whatever others say; the first error.
fn each(devices: &Devices, mark: Mark) -> Result<()> {
    let all = devices.iter().map(|device| device.mark(mark));
    all.fold(Ok(()), Result::and)
}

fn and(error: &Error, also: &Error) -> Error {
    Error {
        message: format!(
            "{}; and what was done could not be undone: {also}",
            error.message
        ),
        ..error.clone()
    }
}

/// The same for one image, which belongs to device `id`.
///
/// # Errors
/// `NotSupported` for an image that has no snapshots; `Changed` for one that is not there; the image's own.
pub(crate) fn mark(id: &str, image: Option<&Image>, mark: Mark) -> Result<()> {
    let Some(image) = image.filter(|image| !image.read_only()) else {
        return Ok(());
    };
    let about = |error| error_of(id, error);
    let has = |name: &str| {
        let list = snapshot::list(image).map_err(about)?;
        Ok::<_, Error>(list.iter().any(|snapshot| snapshot.name == name))
    };
    match mark {
        Mark::Check => snapshot::list(image).map(|_| ()).map_err(about),
        Mark::Take(name) => snapshot::create(image, name).map(|_| ()).map_err(about),
        Mark::Find(name) => match has(name)? {
            true => Ok(()),
            false => {
                let message = format!("has no internal snapshot {name} any more");
                Err(Error::new(Kind::Changed, id, message))
            }
        },
        Mark::GoBack(name) => snapshot::apply(image, name).map_err(about),
        // One without snapshots has not this one either.
        Mark::Drop(name) => match has(name) {
            Ok(true) => snapshot::delete(image, name).map_err(about),
            _ => Ok(()),
        },
        Mark::Undo(name) => match has(name) {
            Ok(true) => {
                snapshot::apply(image, name).map_err(about)?;
                snapshot::delete(image, name).map_err(about)
            }
            _ => Ok(()),
        },
    }
}
