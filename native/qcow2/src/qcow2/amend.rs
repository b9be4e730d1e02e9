// SPDX-License-Identifier: Apache-2.0
//! Changing an image's options afterwards: its version, lazy refcounts, the data file's name, the width of
//! refcounts.
//!
//! Each change is one switch of the header, in one sector, behind everything that it relies on. What a downgrade
//! needs first (no zero clusters, no bitmaps) is as good a version 3 image as before, so it may stop anywhere.

use std::fs::File;
use std::sync::Arc;

use crate::blocking::{commit, run, settle};
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::locks::{self, Use};
use crate::plan::Stop;
use crate::qcow2::bitmaps::{self, qcow2_of};
use crate::qcow2::check::{Checker, CHECK_MEMORY};
use crate::qcow2::entry::{L2Entry, Mapping};
use crate::qcow2::header::{
    autoclear, extension, feature_names, incompatible, Extension, Header, LAZY_REFCOUNTS,
};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::snapshot::{self, file_of, read_l1};
use crate::qcow2::{repair, Geometry};
use crate::state::Layer;
use crate::types::GuestCluster;

/// What is to be changed; None leaves it as it is.
#[derive(Debug, Clone, Default)]
pub struct AmendOptions {
    /// 2 or 3.
    pub version: Option<u32>,
    /// The compatible feature bit (version 3).
    pub lazy_refcounts: Option<bool>,
    /// Another name for the external data file that there is.
    pub data_name: Option<String>,
    /// Whether the data file holds exactly the guest's bytes; it can only be given up.
    pub data_raw: Option<bool>,
}

/// Change an active image's options. No request may be under way.
pub fn amend(image: &Arc<Image>, options: &AmendOptions) -> Result<()> {
    image.writable()?;
    if !image.active() || image.lock().epochs.under_way() > 0 {
        return Err(Error::new(
            Kind::InvalidState,
            "amending needs an active image without requests under way",
        ));
    }
    image.lock().check_sound()?;
    settle(image)?;
    let (header, geometry) = qcow2_of(image)?;
    check(&header, options)?;
    let version = options.version.unwrap_or(header.version);
    if version == 2 && header.version == 3 {
        check_downgrade(image, &header, &geometry)?;
        for bitmap in bitmaps::list(image)? {
            bitmaps::remove(image, &bitmap.name)?;
        }
        expand_zeros(image, &geometry)?;
    }
    let mut header = image.lock().current_header()?;
    change(&mut header, options);
    let mut state = image.lock();
    if let Some(Layer::Qcow2(qcow2)) = state.layers.first_mut() {
        qcow2.geometry.version = header.version;
    }
    state.writer()?.geometry.version = header.version;
    state.replace_header(header)?;
    drop(state);
    commit(image)
}

fn check(header: &Header, options: &AmendOptions) -> Result<()> {
    let refuse = |message: &str| Err(Error::new(Kind::InvalidArgument, message));
    let version = options.version.unwrap_or(header.version);
    if !(2..=3).contains(&version) {
        return refuse("Unknown compatibility level");
    }
    if version == 2 && options.lazy_refcounts == Some(true) {
        return refuse(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        );
    }
    if options.data_name.is_some() && !header.has_data_file() {
        return refuse("data-file can only be set for images that use an external data file");
    }
    let raw = header.autoclear & autoclear::DATA_FILE_RAW != 0;
    if options.data_raw == Some(true) && !raw {
        return refuse("data-file-raw cannot be set on existing images");
    }
    Ok(())
}

/// Set the fields; version 2 has none of them.
fn change(header: &mut Header, options: &AmendOptions) {
    header.version = options.version.unwrap_or(header.version);
    match options.lazy_refcounts {
        Some(true) => header.compatible |= LAZY_REFCOUNTS,
        Some(false) => header.compatible &= !LAZY_REFCOUNTS,
        None => {}
    }
    if options.data_raw == Some(false) {
        header.autoclear &= !autoclear::DATA_FILE_RAW;
    }
    if let Some(name) = &options.data_name {
        let known = &mut header.extensions;
        known.retain(|known| known.kind != extension::DATA_FILE);
        let (kind, data) = (extension::DATA_FILE, name.clone().into_bytes());
        known.insert(0, Extension { kind, data });
    }
    let named = |known: &Extension| known.kind == extension::FEATURE_NAMES;
    if header.version == 2 {
        (header.compatible, header.autoclear) = (0, 0);
        header.extensions.retain(|known| !named(known));
    } else if !header.extensions.iter().any(named) {
        header.extensions.push(feature_names());
    }
}

/// What version 2 cannot hold, before anything is changed.
fn check_downgrade(image: &Image, header: &Header, geometry: &Geometry) -> Result<()> {
    let refuse = |message: String| Err(Error::unsupported(message));
    if header.has_data_file() {
        return refuse("Cannot downgrade an image with a data file".into());
    }
    let others = header.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT);
    if others != 0 {
        return refuse(format!(
            "Cannot downgrade an image with incompatible features {others:#x} set"
        ));
    }
    if header.refcount_order != 4 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "compat=0.10 requires refcount_bits=16",
        ));
    }
    let file = file_of(image, geometry)?;
    for snapshot in snapshot::list(image)? {
        let other_size = snapshot.disk_size.is_some_and(|size| size != header.size);
        if other_size || snapshot.vm_state_size > u64::from(u32::MAX) {
            return refuse("Internal snapshots prevent downgrade of image".into());
        }
        let mut table = vec![0; geometry.cluster() as usize];
        for entry in read_l1(image, geometry, snapshot.l1_offset, snapshot.l1_entries)? {
            let Some(place) = decode_l1(geometry, entry)? else {
                continue;
            };
            file.read_at(&mut table, place.offset.0)?;
            for entry in L2Entry::all(geometry, &table) {
                if matches!(entry.decode(geometry)?, Mapping::Zero { .. }) {
                    return refuse(format!(
                        "Snapshot '{}' has zero clusters, which prevent downgrade of image",
                        snapshot.name.escape_debug()
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Let no cluster be zeros by its mapping: unallocated where nothing lies below, else data.
fn expand_zeros(image: &Arc<Image>, geometry: &Geometry) -> Result<()> {
    let (below, size) = (image.lock().layers.len() > 1, image.size());
    let mut disk = Disk::blocking(image.clone())?;
    let mut data = Vec::new();
    for cluster in 0..size.div_ceil(geometry.cluster()) {
        let written = run(image, |state, waiter| {
            if state.cache.crowded() || state.too_much_freed() {
                return Err(Stop::Commit);
            }
            let guest = GuestCluster(cluster);
            let mapping = state.lookup(geometry, guest, waiter)?;
            if !matches!(mapping, Mapping::Zero { .. }) || below {
                return Ok(matches!(mapping, Mapping::Zero { .. }));
            }
            let table = state.writable_l2(geometry, image.files(), guest, waiter)?;
            let index = cluster % geometry.l2_entries();
            state.set_l2_entry(geometry, table, index, L2Entry::default());
            state.discard_mapping(geometry, mapping);
            Ok(false)
        })?;
        if written {
            let start = cluster << geometry.cluster_bits;
            data.resize(geometry.cluster().min(size - start) as usize, 0);
            disk.write(start, &data)?;
        }
    }
    disk.flush()?;
    settle(image)
}

/// Count clusters with another width: 1 to 64 bits, a power of two. The image is not open elsewhere.
pub fn set_refcount_bits(file: &File, bits: u32) -> Result<()> {
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    let file = BlockFile::new(
        file.try_clone()
            .map_err(|e| Error::io("dup of the image's fd", &e))?,
    )?;
    locks::lock(file.fd(), Use::Write)?;
    let changed = widen(&file, bits.trailing_zeros());
    locks::unlock(file.fd());
    changed
}

fn widen(file: &BlockFile, order: u32) -> Result<()> {
    let mut checker = Checker::new(file, CHECK_MEMORY)?;
    if checker.header.refcount_order == order {
        return Ok(());
    }
    if checker.header.version < 3 {
        let message =
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
                       compat=1.1 or greater)";
        return Err(Error::new(Kind::InvalidArgument, message));
    }
    let report = checker.run()?;
    if report.corruptions > 0 {
        return Err(Error::invalid(
            "the image is damaged: run check -r all before its refcounts are changed",
        ));
    }
    repair::rebuild(file, &mut checker, order)
}
