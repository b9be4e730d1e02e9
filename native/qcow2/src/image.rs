// SPDX-License-Identifier: Apache-2.0
//! An image with its chain: opened files in, plans out.
//!
//! The caller opens every file and states every format. A name in a header is only ever compared
//! with what the caller says it is; nothing in this crate opens a path, so a hostile header can name
//! what it likes.
//!
//! An image is *inactive* (no locks, nothing cached, no writes) or *active*. `activate` takes the
//! locks and reads the metadata anew; `inactivate` makes everything durable and drops the locks. A
//! machine that is being migrated on a shared disk uses only these two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::buffer::Buffer;
use crate::commit::Want;
use crate::crypt::{self, Secret};
use crate::error::{Error, Kind, Result};
use crate::file::{BlockFile, Stamp};
use crate::locks::{self, Use};
use crate::mailbox::Waiter;
use crate::options::{DetectZeroes, LayerFiles, OpenOptions};
use crate::plan::{CommitStep, Extents, FileId, Need, Planned, Stop, WriteStep, ZeroStep};
use crate::qcow2::bitmaps;
use crate::qcow2::zero::Zeroing;
use crate::state::{Layer, State};

/// The deepest chain that is opened.
pub const MAX_LAYERS: usize = 200;

/// An opened image or chain, active layer first.
pub struct Image {
    files: Vec<BlockFile>,
    /// How many of the files belong to the active layer (they come first).
    active_files: usize,
    options: OpenOptions,
    size: AtomicU64,
    state: Mutex<State>,
}

impl Image {
    /// Open a chain, active layer first. Headers are read and checked against the names given; the
    /// image is inactive afterwards.
    ///
    /// Errors: ImageInvalid for a header that is not one or contradicts itself, BackingChanged for
    /// another name than the caller's, NotSupported for a feature this version does not have.
    pub fn open_chain(layers: Vec<LayerFiles>, options: OpenOptions) -> Result<Image> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("a chain has 1 to {MAX_LAYERS} layers"),
            ));
        }
        let mut files = Vec::new();
        let mut described = Vec::new();
        let mut secrets = Vec::new();
        for layer in layers {
            let file = files.len();
            files.push(BlockFile::new(layer.file)?);
            let data = match layer.data_file {
                Some(data) => {
                    files.push(BlockFile::new(data)?);
                    file + 1
                }
                None => file,
            };
            secrets.push(layer.secret);
            described.push(crate::state::Described {
                format: layer.format,
                file,
                data,
                backing_name: layer.backing_name,
                data_name: layer.data_name,
            });
        }
        no_file_twice(&files)?;
        let active_files = described.first().map_or(0, |layer| layer.data + 1);
        let state = State::open(&files, described, &options)?;
        unlock(&mut files, &state, &secrets)?;
        Ok(Image {
            size: AtomicU64::new(state.size()),
            files,
            active_files,
            options,
            state: Mutex::new(state),
        })
    }

    /// Take the locks and read all metadata anew. Does nothing on an active image.
    ///
    /// Errors: InUse when another process uses a file in a way that excludes this.
    pub fn activate(&self) -> Result<()> {
        let mut state = self.lock();
        if state.active {
            return Ok(());
        }
        if self.options.locks {
            self.take_locks()?;
        }
        match state.activate(&self.files, self.options.snapshot.as_deref()) {
            Ok(()) => {
                self.size.store(state.size(), Ordering::Release);
                Ok(())
            }
            Err(error) => {
                self.drop_locks();
                Err(error)
            }
        }
    }

    /// Make everything durable and drop the locks. No request may be under way.
    ///
    /// If that fails the image stays active, and keeps its locks: it can be used on, and let go again.
    pub fn inactivate(&self) -> Result<()> {
        if !self.lock().active {
            return Ok(());
        }
        if self.lock().epochs.under_way() > 0 {
            return Err(Error::new(
                Kind::InvalidState,
                "requests of this image are under way",
            ));
        }
        crate::blocking::settle(self)?;
        // A bitmap that cannot be stored is lost, and marked so; the disk itself is closed all the same.
        let stored = bitmaps::store(self);
        crate::blocking::run(self, |state, waiter| state.give_back_reserve(waiter))?;
        crate::blocking::settle(self)?;
        let mut state = self.lock();
        state.inactivate(&self.files)?;
        drop(state);
        self.drop_locks();
        stored
    }

    /// As [`Image::inactivate`], for good: if that fails the locks are dropped all the same, and what could not be
    /// made durable is lost.
    pub fn close(&self) -> Result<()> {
        let done = self.inactivate();
        let mut state = self.lock();
        if done.is_err() && state.active && state.epochs.under_way() == 0 {
            state.abandon();
            drop(state);
            self.drop_locks();
        }
        done
    }

    /// The disk's size in bytes, as the guest sees it.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the active layer may not be written.
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// Whether flushes reach the disk.
    pub(crate) fn syncs(&self) -> bool {
        self.options.sync
    }

    /// What becomes of writes of zeros.
    pub(crate) fn detect_zeroes(&self) -> DetectZeroes {
        self.options.detect_zeroes
    }

    /// Whether the image is active.
    pub fn active(&self) -> bool {
        self.lock().active
    }

    /// By what each file of the chain is known again, in the chain's order.
    pub fn stamps(&self) -> Result<Vec<Stamp>> {
        self.files.iter().map(BlockFile::stamp).collect()
    }

    /// How many host files the chain has: the room it needs in a ring's file table.
    pub fn file_count(&self) -> u32 {
        self.files.len() as u32
    }

    /// Whether guest data of the active layer is encrypted. Writes are then of whole 512-byte sectors.
    pub fn encrypted(&self) -> bool {
        self.files
            .iter()
            .take(self.active_files)
            .any(|file| file.sealer.is_some())
    }

    /// Whether what it holds may have to be expanded or decrypted.
    pub fn is_coded(&self) -> bool {
        let layers = &self.lock().layers;
        layers.iter().any(|layer| matches!(layer, Layer::Qcow2(_)))
    }

    /// The cipher of a file with encrypted data.
    pub(crate) fn sealer(&self, file: FileId) -> Result<&crypt::Sealer> {
        self.files
            .get(file)
            .and_then(|file| file.sealer.as_ref())
            .ok_or_else(|| Error::invalid("no cipher for encrypted data"))
    }

    pub(crate) fn files(&self) -> &[BlockFile] {
        &self.files
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug; the state is used on, since each change is complete or
        // leads to a leak at worst.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Whether requests that write are taken.
    pub(crate) fn writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(
                Kind::InvalidState,
                "the image was opened read-only",
            ));
        }
        Ok(())
    }

    pub(crate) fn enter(&self) -> u64 {
        self.lock().epochs.enter()
    }

    pub(crate) fn leave(&self, epoch: u64) {
        self.lock().epochs.leave(epoch);
    }

    pub(crate) fn renew(&self, epoch: u64) -> u64 {
        self.lock().epochs.renew(epoch)
    }

    pub(crate) fn plan_read(&self, at: u64, len: u64, waiter: &Waiter) -> Planned<Extents> {
        self.ready()?.plan_read(at, len, waiter)
    }

    /// `durable`: the write ends when it is on the disk.
    pub(crate) fn plan_write(
        &self,
        at: u64,
        len: u64,
        durable: bool,
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        let mut state = self.ready()?;
        let step = state.plan_write(&self.files, at, len, durable, waiter)?;
        state.mark_dirty(at, step.len());
        Ok(step)
    }

    pub(crate) fn plan_zero(
        &self,
        at: u64,
        len: u64,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        let mut state = self.ready()?;
        let step = state.plan_zero(&self.files, at, len, how, waiter)?;
        state.mark_dirty(at, step.len());
        Ok(step)
    }

    /// Whether the disk has everything that leads to the data of a range, as it is mapped now.
    pub(crate) fn on_disk(&self, at: u64, len: u64) -> bool {
        self.lock().on_disk(at, len)
    }

    /// A write that was to be durable has failed. Unless it was for want of room, what others have written may
    /// be lost as well: as after a failed fdatasync (commit.rs).
    pub(crate) fn durable_write_failed(&self, error: &Error) {
        if !matches!(
            error.errno(),
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
        ) {
            self.lock().failed.get_or_insert(error.clone());
        }
    }

    pub(crate) fn finish(&self, ticket: u64, ok: bool) {
        self.lock().finish(ticket, ok);
    }

    pub(crate) fn supply(&self, need: Need, content: Result<Buffer>) {
        self.lock().cache.supply(need, content);
    }

    pub(crate) fn join_commit(&self, waiters: Vec<Waiter>, want: Want) -> Option<CommitStep> {
        self.lock().join_commit(waiters, want)
    }

    pub(crate) fn commit_begin(&self) -> CommitStep {
        self.lock().commit_begin()
    }

    pub(crate) fn commit_next(&self, result: Result<()>) -> CommitStep {
        self.lock().commit_next(result)
    }

    fn ready(&self) -> Planned<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.active {
            Ok(state)
        } else {
            Err(Stop::Fail(Error::new(
                Kind::InvalidState,
                "the image is not active",
            )))
        }
    }

    fn take_locks(&self) -> Result<()> {
        for (place, file) in self.files.iter().enumerate() {
            let usage = if place < self.active_files && !self.options.read_only {
                Use::Write
            } else {
                Use::Read
            };
            if let Err(error) = locks::lock(file.fd(), usage) {
                self.files
                    .iter()
                    .take(place)
                    .for_each(|file| locks::unlock(file.fd()));
                return Err(error);
            }
        }
        Ok(())
    }

    fn drop_locks(&self) {
        if self.options.locks {
            self.files.iter().for_each(|file| locks::unlock(file.fd()));
        }
    }
}

impl Drop for Image {
    /// The locks of a passed file belong to its other holders too, so they would outlive our descriptor.
    fn drop(&mut self) {
        if self.lock().active {
            self.drop_locks();
        }
    }
}

/// Give each file with encrypted data its cipher.
fn unlock(files: &mut [BlockFile], state: &State, secrets: &[Option<Secret>]) -> Result<()> {
    for (number, (layer, secret)) in state.layers.iter().zip(secrets).enumerate() {
        let (place, sealer) = match layer {
            Layer::Raw(_) if secret.is_some() => {
                let message = "a passphrase for a raw image, which is not encrypted";
                return Err(Error::new(Kind::InvalidArgument, message).of_layer(number));
            }
            Layer::Raw(_) => continue,
            Layer::Qcow2(qcow2) => {
                let missing = || Error::invalid("no such file in the chain");
                let file = files.get(qcow2.geometry.file).ok_or_else(missing)?;
                let sealer = crypt::unlock(file, &qcow2.header, secret.as_ref())
                    .map_err(|e| e.of_layer(number))?;
                (qcow2.geometry.data, sealer)
            }
        };
        if let Some(file) = files.get_mut(place) {
            file.sealer = sealer;
        }
    }
    Ok(())
}

/// The same file twice in a chain would be a loop, or a layer under itself.
fn no_file_twice(files: &[BlockFile]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for file in files {
        if !seen.insert(file.identity) {
            return Err(Error::new(
                Kind::ImageInvalid,
                "the same file stands twice in the chain",
            ));
        }
    }
    Ok(())
}
