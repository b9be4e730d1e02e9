// SPDX-License-Identifier: Apache-2.0
//! What stands under an image's lock: its layers, the metadata cache, and what is under way.
//!
//! There is one lock an image. It is held for lookups and changes in memory only, never during
//! input or output; requests of several I/O threads meet here for about a microsecond each.

use crate::cache::Cache;
use crate::commit::Commits;
use crate::epoch::Epochs;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::options::OpenOptions;
use crate::plan::{FileId, Planned, Stop, WriteStep, ZeroStep};
use crate::qcow2::alloc::Writer;
use crate::qcow2::bitmaps::tracking::Tracking;
use crate::qcow2::check;
use crate::qcow2::header::{autoclear, field, incompatible};
use crate::qcow2::zero::Zeroing;
use crate::qcow2::{snapshot, Qcow2};
use crate::types::{Format, HostOffset};

/// A layer as the caller describes it.
pub(crate) struct Described {
    pub(crate) format: Format,
    pub(crate) file: FileId,
    pub(crate) data: FileId,
    pub(crate) backing_name: Option<String>,
    pub(crate) data_name: Option<String>,
}

/// One layer of the chain.
pub(crate) enum Layer {
    /// The bytes as they are.
    Raw(Raw),
    /// QEMU's format.
    Qcow2(Box<Qcow2>),
}

/// A raw image.
pub(crate) struct Raw {
    pub(crate) file: FileId,
    pub(crate) size: u64,
}

/// Everything under the lock.
pub(crate) struct State {
    pub(crate) active: bool,
    pub(crate) read_only: bool,
    /// Whether discarded clusters' space goes back to the host.
    pub(crate) discard: bool,
    /// Whether commits sync.
    pub(crate) sync: bool,
    pub(crate) layers: Vec<Layer>,
    pub(crate) cache: Cache,
    /// Grows before a host cluster can become free, and when all is read anew: while it is the same, so are the bytes of
    /// a compressed cluster that is mapped (engine/expanded.rs).
    pub(crate) era: u64,
    pub(crate) epochs: Epochs,
    pub(crate) commits: Commits,
    /// What writing to a qcow2 layer needs; none while inactive, read-only or raw.
    pub(crate) writer: Option<Writer>,
    /// What the enabled bitmaps of a qcow2 layer that is written hear of.
    pub(crate) tracking: Tracking,
    /// The first failed fdatasync (commit.rs).
    pub(crate) failed: Option<Error>,
}

impl State {
    pub(crate) fn open(
        files: &[BlockFile],
        described: Vec<Described>,
        options: &OpenOptions,
    ) -> Result<State> {
        let mut layers = Vec::new();
        for (number, layer) in described.into_iter().enumerate() {
            let file = files.get(layer.file).ok_or_else(no_file)?;
            layers.push(match layer.format {
                Format::Raw if layer.backing_name.is_some() || layer.data != layer.file => {
                    return Err(Error::new(
                        Kind::InvalidArgument,
                        "a raw image has no backing and no data file",
                    ));
                }
                Format::Raw => Layer::Raw(Raw {
                    file: layer.file,
                    size: file.len()?,
                }),
                Format::Qcow2 => Layer::Qcow2(Box::new(
                    Qcow2::open(number, files, &layer).map_err(|e| e.of_layer(number))?,
                )),
            });
        }
        check_chain(&layers)?;
        Ok(State {
            active: false,
            read_only: options.read_only,
            discard: options.discard,
            sync: options.sync,
            layers,
            cache: Cache::new((options.cache / 4096).max(2048)),
            era: 0,
            epochs: Epochs::default(),
            commits: Commits::default(),
            writer: None,
            tracking: Tracking::default(),
            failed: None,
        })
    }

    pub(crate) fn size(&self) -> u64 {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => raw.size,
            Some(Layer::Qcow2(qcow2)) => qcow2.header.size,
            None => 0,
        }
    }

    pub(crate) fn activate(&mut self, files: &[BlockFile], snapshot: Option<&str>) -> Result<()> {
        self.cache.clear();
        self.era += 1;
        self.writer = None;
        self.tracking = Tracking::default();
        self.failed = None;
        for (number, layer) in self.layers.iter_mut().enumerate() {
            match layer {
                Layer::Raw(raw) => raw.size = files.get(raw.file).ok_or_else(no_file)?.len()?,
                Layer::Qcow2(qcow2) => qcow2.reread(files).map_err(|e| e.of_layer(number))?,
            }
        }
        check_chain(&self.layers)?;
        if let Some(wanted) = snapshot {
            self.show_snapshot(files, wanted)?;
        }
        if !self.read_only {
            self.open_writer(files)?;
        }
        self.active = true;
        Ok(())
    }

    /// Look at the disk through a snapshot's L1 table.
    fn show_snapshot(&mut self, files: &[BlockFile], wanted: &str) -> Result<()> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first_mut().filter(|_| self.read_only) else {
            return Err(Error::new(
                Kind::InvalidArgument,
                "snapshots are looked at in qcow2 images, read-only",
            ));
        };
        let file = files.get(qcow2.geometry.file).ok_or_else(no_file)?;
        let (snapshots, _) = snapshot::read_table(file, &qcow2.header)?;
        let found = snapshots
            .get(snapshot::find(&snapshots, wanted)?)
            .ok_or_else(no_file)?;
        if found.l1_offset % qcow2.geometry.cluster() != 0 {
            return Err(Error::invalid(
                "the snapshot's L1 table offset is not a cluster's",
            ));
        }
        qcow2.header.l1_offset = found.l1_offset;
        qcow2.header.l1_entries = found.l1_entries;
        qcow2.header.size = found
            .disk_size
            .filter(|size| *size > 0)
            .unwrap_or(qcow2.header.size);
        Ok(())
    }

    fn open_writer(&mut self, files: &[BlockFile]) -> Result<()> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first_mut() else {
            return Ok(());
        };
        let file = files.get(qcow2.geometry.file).ok_or_else(no_file)?;
        if qcow2.header.incompatible & incompatible::DIRTY != 0 && file.writable {
            // Refcounts were written lazily and the image was not closed: count anew, as QEMU does.
            check::repair_dirty(file)?;
            qcow2.reread(files)?;
        }
        qcow2.check_writable()?;
        let data = files.get(qcow2.geometry.data).ok_or_else(no_file)?;
        if !file.writable || !data.writable {
            return Err(Error::new(
                Kind::InvalidArgument,
                "the image file was opened read-only",
            ));
        }
        if file.alignment as u64 > qcow2.geometry.block().min(qcow2.geometry.subcluster()) {
            return Err(Error::unsupported(
                "clusters or subclusters smaller than what direct I/O on this file system can write",
            ));
        }
        let mut writer = Writer::open(qcow2.geometry, file, qcow2)?;
        // What this version does not keep up to date must not be believed afterwards.
        let keep = qcow2.header.autoclear & (autoclear::DATA_FILE_RAW | autoclear::BITMAPS);
        let stale = qcow2.header.autoclear != keep;
        qcow2.header.autoclear = keep;
        if stale {
            crate::bytes::put64(writer.header.bytes_mut(), field::AUTOCLEAR, keep);
        }
        self.writer = Some(writer);
        if stale {
            self.cache_header()?;
        }
        self.begin_tracking(files)
    }

    pub(crate) fn inactivate(&mut self, files: &[BlockFile]) -> Result<()> {
        if let Some(writer) = &self.writer {
            let file = files.get(writer.geometry.file).ok_or_else(no_file)?;
            if file.regular && file.len()? > writer.used_len() {
                file.set_len(writer.used_len())?;
                if self.sync {
                    file.sync()?;
                }
            }
        }
        self.abandon();
        Ok(())
    }

    /// Be inactive, whatever is lost by it.
    pub(crate) fn abandon(&mut self) {
        self.writer = None;
        self.tracking = Tracking::default();
        self.cache.clear();
        self.active = false;
    }

    /// The files that a commit syncs: the image, and the data file where that is another.
    pub(crate) fn written_files(&self) -> (Option<FileId>, Option<FileId>) {
        match self.layers.first() {
            _ if self.read_only || !self.sync => (None, None),
            Some(Layer::Raw(raw)) => (Some(raw.file), None),
            Some(Layer::Qcow2(qcow2)) => {
                let geometry = qcow2.geometry;
                (
                    Some(geometry.file),
                    geometry.external_data().then_some(geometry.data),
                )
            }
            None => (None, None),
        }
    }

    /// The L1 table of a qcow2 layer: offset and entries.
    pub(crate) fn l1(&self, layer: usize) -> Option<(HostOffset, u64)> {
        match self.layers.get(layer)? {
            Layer::Raw(_) => None,
            Layer::Qcow2(qcow2) => Some((
                HostOffset(qcow2.header.l1_offset),
                u64::from(qcow2.header.l1_entries),
            )),
        }
    }

    pub(crate) fn plan_write(
        &mut self,
        files: &[BlockFile],
        at: u64,
        len: u64,
        durable: bool,
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => Ok(WriteStep::InPlace {
                file: raw.file,
                offset: HostOffset(at),
                len,
            }),
            Some(Layer::Qcow2(qcow2)) => {
                let geometry = qcow2.geometry;
                self.plan_write_qcow2(&geometry, files, (at, len), durable, waiter)
            }
            None => Err(Stop::Fail(no_file())),
        }
    }

    /// Whether the disk has everything that leads to the data of a range: the tables as they are here, and so what
    /// their commit put before them.
    pub(crate) fn on_disk(&self, at: u64, len: u64) -> bool {
        if !self.sync || self.failed.is_some() {
            return false;
        }
        match self.layers.first() {
            Some(Layer::Raw(_)) => true,
            Some(Layer::Qcow2(qcow2)) => {
                let clusters = at >> qcow2.geometry.cluster_bits
                    ..(at + len).div_ceil(qcow2.geometry.cluster());
                self.mapped_on_disk(&qcow2.geometry, clusters)
            }
            None => false,
        }
    }

    pub(crate) fn plan_zero(
        &mut self,
        files: &[BlockFile],
        at: u64,
        len: u64,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => Ok(ZeroStep::Fallocate {
                file: raw.file,
                offset: HostOffset(at),
                len,
                punch: how.unmap,
            }),
            Some(Layer::Qcow2(qcow2)) => {
                let geometry = qcow2.geometry;
                self.plan_zero_qcow2(&geometry, files, at, len, how, waiter)
            }
            None => Err(Stop::Fail(no_file())),
        }
    }

    /// A plan stopped half way and is content with what it has: whoever would have read the block
    /// does not.
    pub(crate) fn drop_stop(&mut self, stop: Stop) {
        if let Stop::Load(need) = stop {
            self.cache.supply(
                need,
                Err(Error::new(Kind::InvalidState, "not read after all")),
            );
        }
    }
}

/// Below a raw image, and below a qcow2 image that names no backing file, there is nothing.
fn check_chain(layers: &[Layer]) -> Result<()> {
    for (number, layer) in layers.iter().enumerate() {
        let names_backing = match layer {
            Layer::Raw(_) => false,
            Layer::Qcow2(qcow2) => qcow2.header.backing_name.is_some(),
        };
        let has_backing = number + 1 < layers.len();
        if names_backing != has_backing {
            let message = if names_backing {
                "a backing file is missing from the chain"
            } else {
                "the chain has a layer that nothing names"
            };
            return Err(Error::new(Kind::BackingChanged, message));
        }
    }
    Ok(())
}

fn no_file() -> Error {
    Error::invalid("no such file in the chain")
}
