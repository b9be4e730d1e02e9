// SPDX-License-Identifier: Apache-2.0
//! What stands under an image's lock: its layers, the metadata cache, and what is under way.
//!
//! There is one lock an image. It is held for lookups and changes in memory only, never during
//! input or output; requests of several I/O threads meet here for about a microsecond each.

use crate::cache::Cache;
use crate::commit::Commits;
use crate::epoch::Epochs;
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::image::OpenOptions;
use crate::mailbox::Waiter;
use crate::plan::{push_extent, Extent, Extents, FileId, Source, Stop, WriteStep, ZeroStep};
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
    pub(crate) layers: Vec<Layer>,
    pub(crate) cache: Cache,
    pub(crate) epochs: Epochs,
    pub(crate) commits: Commits,
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
        for layer in described {
            let file = files
                .get(layer.file)
                .ok_or_else(|| Error::invalid("no such file in the chain"))?;
            match layer.format {
                Format::Raw => layers.push(Layer::Raw(Raw {
                    file: layer.file,
                    size: file.len()?,
                })),
                Format::Qcow2 => return Err(Error::unsupported("qcow2 images")),
            }
        }
        Ok(State {
            active: false,
            read_only: options.read_only,
            layers,
            cache: Cache::new(options.cache / 4096),
            epochs: Epochs::default(),
            commits: Commits::default(),
            failed: None,
        })
    }

    pub(crate) fn size(&self) -> u64 {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => raw.size,
            None => 0,
        }
    }

    pub(crate) fn activate(&mut self, files: &[BlockFile], _options: &OpenOptions) -> Result<()> {
        self.cache.clear();
        for layer in &mut self.layers {
            match layer {
                Layer::Raw(raw) => {
                    let file = files
                        .get(raw.file)
                        .ok_or_else(|| Error::invalid("no such file in the chain"))?;
                    raw.size = file.len()?;
                }
            }
        }
        self.active = true;
        Ok(())
    }

    pub(crate) fn inactivate(&mut self, _files: &[BlockFile]) -> Result<()> {
        self.cache.clear();
        self.active = false;
        Ok(())
    }

    /// The files that a commit syncs: the image, and the data file where that is another.
    pub(crate) fn written_files(&self) -> (Option<FileId>, Option<FileId>) {
        match self.layers.first() {
            Some(Layer::Raw(raw)) if !self.read_only => (Some(raw.file), None),
            _ => (None, None),
        }
    }

    pub(crate) fn plan_read(
        &mut self,
        at: u64,
        len: u64,
        waiter: &Waiter,
    ) -> std::result::Result<Extents, Stop> {
        let mut extents = Extents::new();
        self.resolve(0, at, len, waiter, &mut extents)?;
        Ok(extents)
    }

    /// Where `len` bytes from `at` come from, seen from `layer` downward.
    pub(crate) fn resolve(
        &mut self,
        layer: usize,
        at: u64,
        len: u64,
        _waiter: &Waiter,
        extents: &mut Extents,
    ) -> std::result::Result<(), Stop> {
        match self.layers.get(layer) {
            None => push_extent(
                extents,
                Extent {
                    len,
                    source: Source::Zero,
                },
            ),
            Some(Layer::Raw(raw)) => {
                let inside = raw.size.saturating_sub(at).min(len);
                let source = Source::File {
                    file: raw.file,
                    offset: HostOffset(at),
                };
                push_extent(
                    extents,
                    Extent {
                        len: inside,
                        source,
                    },
                );
                push_extent(
                    extents,
                    Extent {
                        len: len - inside,
                        source: Source::Zero,
                    },
                );
            }
        }
        Ok(())
    }

    pub(crate) fn plan_write(
        &mut self,
        _files: &[BlockFile],
        at: u64,
        len: u64,
        _waiter: &Waiter,
    ) -> std::result::Result<WriteStep, Stop> {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => Ok(WriteStep::InPlace {
                file: raw.file,
                offset: HostOffset(at),
                len,
            }),
            None => Err(Stop::Fail(Error::invalid("the chain is empty"))),
        }
    }

    pub(crate) fn plan_zero(
        &mut self,
        _files: &[BlockFile],
        at: u64,
        len: u64,
        _required: bool,
        unmap: bool,
        _waiter: &Waiter,
    ) -> std::result::Result<ZeroStep, Stop> {
        match self.layers.first() {
            Some(Layer::Raw(raw)) => Ok(ZeroStep::Fallocate {
                file: raw.file,
                offset: HostOffset(at),
                len,
                punch: unmap,
            }),
            None => Err(Stop::Fail(Error::invalid("the chain is empty"))),
        }
    }

    pub(crate) fn finish(&mut self, _ticket: u64, _ok: bool) {}

    pub(crate) fn freed_at_begin(&mut self) {}

    pub(crate) fn freed_at_end(&mut self, _ok: bool) {}

    pub(crate) fn release_freed(&mut self, _waiter: &Waiter) -> std::result::Result<(), Stop> {
        Ok(())
    }

    /// Whether a commit would change anything on the disk.
    pub(crate) fn unsettled(&self) -> bool {
        self.cache.has_dirty()
    }
}
