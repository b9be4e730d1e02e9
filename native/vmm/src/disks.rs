// SPDX-License-Identifier: Apache-2.0
//! The definition's disks: their files become chains of images, opened, checked and active.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmbus_qcow2::{DetectZeroes, Format, Image, LayerFiles, OpenOptions, Secret};

use crate::block::{activate, error_of};
use crate::config::{Disk, DiskBus};
use crate::devices::{DiskSpec, ScsiSpec};
use crate::error::{Error, Result};

/// The descriptors of one layer.
pub struct LayerFds {
    /// The image.
    pub image: OwnedFd,
    /// Its external data file.
    pub data: Option<OwnedFd>,
    /// What holds its passphrase.
    pub secret: Option<OwnedFd>,
}

/// The disks of a machine, opened.
#[derive(Default)]
pub struct Disks {
    /// Those with a function of their own.
    pub block: Vec<DiskSpec>,
    /// Those of the host adapter, by target.
    pub scsi: Vec<ScsiSpec>,
}

/// Opens all of them; `active`: for use at once. `files` has the descriptors of each disk's layers, in the same order.
///
/// # Errors
/// What is wrong with a chain, with the disk or, where it is one layer's, its slot as the argument.
pub fn open(disks: &[Disk], files: Vec<Vec<LayerFds>>, active: bool) -> Result<Disks> {
    let mut ids = BTreeSet::new();
    let mut opened = Disks::default();
    for (index, (disk, files)) in disks.iter().zip(files).enumerate() {
        check(index, disk)?;
        if !ids.insert(&disk.id) {
            return Err(Error::invalid(
                format!("disks[{index}].id"),
                format!("{:?} is the id of another disk", disk.id),
            ));
        }
        if disk.cdrom || disk.bus == DiskBus::Scsi {
            opened.scsi.push(open_scsi(disk, files, active)?);
        } else {
            opened.block.push(open_disk(disk, files, active)?);
        }
    }
    Ok(opened)
}

fn check(index: usize, disk: &Disk) -> Result<()> {
    let id = disk.id.as_bytes();
    let letters = |bytes: &[u8]| {
        bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
    };
    if id.len() > 20 || !letters(id) || !id.first().is_some_and(u8::is_ascii_lowercase) {
        return Err(Error::invalid(
            format!("disks[{index}].id"),
            format!(
                "{:?} is not a letter and up to 19 of a-z, 0-9 and -",
                disk.id
            ),
        ));
    }
    let printable = disk.serial.bytes().all(|b| (b' '..=b'~').contains(&b));
    if disk.serial.len() > 20 || !printable {
        return Err(Error::invalid(
            format!("disks[{index}].serial"),
            "more than 20 characters, or some that are not printable ASCII",
        ));
    }
    Ok(())
}

fn open_disk(disk: &Disk, files: Vec<LayerFds>, active: bool) -> Result<DiskSpec> {
    Ok(DiskSpec {
        id: disk.id.clone(),
        image: open_image(disk, files, active)?,
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        queues: disk.queues,
        slot: disk.slot,
    })
}

fn open_scsi(disk: &Disk, files: Vec<LayerFds>, active: bool) -> Result<ScsiSpec> {
    if disk.slot.is_some() {
        let message = "is for disks with a function of their own";
        return Err(Error::invalid(format!("disk/{}", disk.id), message));
    }
    Ok(ScsiSpec {
        id: disk.id.clone(),
        image: open_medium(disk, files, active)?,
        cdrom: disk.cdrom,
        read_only: disk.read_only,
        name: scsi_name(&disk.serial, &disk.id),
    })
}

/// What a unit says its name is: its serial number, if it has one.
pub(crate) fn scsi_name(serial: &str, id: &str) -> String {
    match serial {
        "" => id.to_owned(),
        serial => serial.to_owned(),
    }
}

/// The image of a disk; of a CD-ROM drive, if it has a medium.
///
/// # Errors
/// As [`open`].
pub fn open_medium(disk: &Disk, files: Vec<LayerFds>, active: bool) -> Result<Option<Arc<Image>>> {
    if disk.cdrom && files.is_empty() {
        return Ok(None);
    }
    open_image(disk, files, active).map(Some)
}

fn open_image(disk: &Disk, files: Vec<LayerFds>, active: bool) -> Result<Arc<Image>> {
    let about = |error: vmbus_qcow2::Error| match error.layer() {
        Some(layer) => error_of(&format!("disk/{}/{layer}", disk.id), error),
        None => error_of(&format!("disk/{}", disk.id), error),
    };
    let layers = disk
        .layers
        .iter()
        .zip(files)
        .enumerate()
        .map(|(index, (layer, fds))| {
            let secret = fds.secret.map(|fd| Secret::read(File::from(fd)));
            Ok(LayerFiles {
                format: layer.format.parse::<Format>().map_err(about)?,
                file: File::from(fds.image),
                data_file: fds.data.map(File::from),
                backing_name: layer.backing_name.clone(),
                data_name: layer.data_name.clone(),
                secret: secret.transpose().map_err(|error| {
                    error_of(&format!("disk/{}/{index}/secret", disk.id), error)
                })?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let options = OpenOptions {
        read_only: disk.read_only || disk.cdrom,
        detect_zeroes: match disk.detect_zeroes.as_str() {
            "" => DetectZeroes::Off,
            name => name.parse().map_err(about)?,
        },
        ..Default::default()
    };
    let image = Image::open_chain(layers, options).map_err(about)?;
    if active {
        activate(&image).map_err(about)?;
    }
    Ok(Arc::new(image))
}
