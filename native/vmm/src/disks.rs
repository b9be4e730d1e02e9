// SPDX-License-Identifier: Apache-2.0
//! The definition's disks: their files become chains of images, opened, checked and active.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmbus_qcow2::{DetectZeroes, Format, Image, LayerFiles, OpenOptions, Secret};

use crate::block::image_error;
use crate::config::Disk;
use crate::devices::DiskSpec;
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

/// Opens all of them; `active`: for use at once. `files` has the descriptors of each disk's layers, in the same order.
///
/// # Errors
/// What is wrong with a chain, with the disk or, where it is one layer's, its slot as the argument.
pub fn open(disks: &[Disk], files: Vec<Vec<LayerFds>>, active: bool) -> Result<Vec<DiskSpec>> {
    let mut ids = BTreeSet::new();
    disks
        .iter()
        .zip(files)
        .enumerate()
        .map(|(index, (disk, files))| {
            check(index, disk)?;
            if !ids.insert(&disk.id) {
                return Err(Error::invalid(
                    format!("disks[{index}].id"),
                    format!("{:?} is the id of another disk", disk.id),
                ));
            }
            open_disk(disk, files, active)
        })
        .collect()
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
    let about = |error: vmbus_qcow2::Error| Error {
        argument: match error.layer() {
            Some(layer) => format!("disk/{}/{layer}", disk.id),
            None => format!("disk/{}", disk.id),
        },
        ..image_error(error)
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
                secret: secret.transpose().map_err(|error| Error {
                    argument: format!("disk/{}/{index}/secret", disk.id),
                    ..image_error(error)
                })?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let options = OpenOptions {
        read_only: disk.read_only,
        detect_zeroes: match disk.detect_zeroes.as_str() {
            "" => DetectZeroes::Off,
            name => name.parse().map_err(about)?,
        },
        ..Default::default()
    };
    let image = Image::open_chain(layers, options).map_err(about)?;
    if active {
        image.activate().map_err(about)?;
    }
    Ok(DiskSpec {
        id: disk.id.clone(),
        image: Arc::new(image),
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        queues: disk.queues,
        slot: disk.slot,
    })
}
