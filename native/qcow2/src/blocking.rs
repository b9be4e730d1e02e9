// SPDX-License-Identifier: Apache-2.0
//! Plans carried out on the calling thread, for what is not a guest's request: deactivation,
//! snapshots, resizing and the tools. The same plans, the same commits, by plain system calls.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::commit::Want;
use crate::crypt::cipher::SECTOR;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::mailbox::{Mailbox, Waiter};
use crate::plan::{CommitIo, CommitStep, Extents, Planned, Source, Stop};
use crate::ring::event_fd;
use crate::state::State;

/// Call `plan` until it comes through, seeing to what stops it.
pub(crate) fn run<T>(
    image: &Image,
    mut plan: impl FnMut(&mut State, &Waiter) -> Planned<T>,
) -> Result<T> {
    let mailbox = mailbox()?;
    loop {
        let waiter = Waiter {
            mailbox: mailbox.clone(),
            task: 0,
        };
        let stopped = plan(&mut image.lock(), &waiter);
        match stopped {
            Ok(value) => return Ok(value),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Wait | Stop::Release { commit: false }) => {
                mailbox.wait();
                mailbox.take();
            }
            Err(Stop::Commit | Stop::Release { commit: true }) => commit(image)?,
            Err(Stop::Load(need)) => {
                let mut buffer = Buffer::zeroed(need.len);
                let read = match image.files().get(need.file) {
                    Some(file) => file.read_at(buffer.bytes_mut(), need.offset.0),
                    None => Err(Error::invalid("no such file in the chain")),
                };
                image.supply(need, read.clone().map(|()| buffer));
                read?;
            }
        }
    }
}

/// Make all that was finished before durable.
pub(crate) fn commit(image: &Image) -> Result<()> {
    let mailbox = mailbox()?;
    let waiter = Waiter {
        mailbox: mailbox.clone(),
        task: 0,
    };
    let begun = image.lock().join_commit(vec![waiter], Want::Commit);
    if let Some(step) = begun {
        drive(image, step);
    }
    loop {
        if let Some((_, Some(result))) = mailbox
            .take()
            .into_iter()
            .find(|(_, result)| result.is_some())
        {
            return result;
        }
        mailbox.wait();
    }
}

/// Commit until nothing is dirty and nothing freed is kept back.
pub(crate) fn settle(image: &Image) -> Result<()> {
    loop {
        commit(image)?;
        run(image, |state, waiter| state.release_freed(waiter))?;
        if !image.lock().unsettled() {
            return Ok(());
        }
    }
}

fn drive(image: &Image, mut step: CommitStep) {
    loop {
        match step {
            CommitStep::Done { again: false } => return,
            CommitStep::Done { again: true } => step = image.commit_begin(),
            CommitStep::Io(ios) => {
                let result = ios.iter().try_for_each(|io| perform(image, io));
                step = image.commit_next(result);
            }
        }
    }
}

fn perform(image: &Image, io: &CommitIo) -> Result<()> {
    let missing = || Error::invalid("no such file in the chain");
    match io {
        CommitIo::Sync { file } => image.files().get(*file).ok_or_else(missing)?.sync(),
        CommitIo::Punch { file, offset, len } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let _ = image
                .files()
                .get(*file)
                .ok_or_else(missing)?
                .fallocate(mode, offset.0, *len);
            Ok(())
        }
        CommitIo::Write {
            file,
            offset,
            blocks,
        } => {
            let bytes: Vec<u8> = blocks
                .iter()
                .flat_map(|block| block.bytes())
                .copied()
                .collect();
            let file = image.files().get(*file).ok_or_else(missing)?;
            file.write_at(&bytes, offset.0)
        }
    }
}

thread_local! {
    static MAILBOX: OnceCell<Arc<Mailbox>> = const { OnceCell::new() };
}

/// The calling thread's own. A letter that nobody waited for any more only makes the next one look again; the
/// outcome of a commit is always waited for.
fn mailbox() -> Result<Arc<Mailbox>> {
    MAILBOX.with(|cell| match cell.get() {
        Some(mailbox) => Ok(mailbox.clone()),
        None => {
            let event = event_fd().map_err(|e| Error::io("eventfd", &e))?;
            Ok(cell.get_or_init(|| Arc::new(Mailbox::new(event))).clone())
        }
    })
}

/// The bytes of a plan's extents, read at once.
pub(crate) fn fetch(image: &Image, extents: &Extents) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    for extent in extents {
        let start = data.len();
        data.resize(start + extent.len as usize, 0);
        let Some(part) = data.get_mut(start..) else {
            continue;
        };
        read_extent(image, &extent.source, part)?;
    }
    Ok(data)
}

/// Fill `part` from one source.
pub(crate) fn read_extent(image: &Image, source: &Source, part: &mut [u8]) -> Result<()> {
    let missing = || Error::invalid("no such file in the chain");
    match source {
        Source::Zero => part.fill(0),
        Source::File { file, offset } => image
            .files()
            .get(*file)
            .ok_or_else(missing)?
            .read_at(part, offset.0)?,
        Source::Sealed {
            file,
            offset,
            place,
        } => {
            let file = image.files().get(*file).ok_or_else(missing)?;
            let skip = (offset.0 % SECTOR as u64) as usize;
            let mut sectors = vec![0; (skip + part.len()).next_multiple_of(SECTOR)];
            file.read_at(&mut sectors, offset.0 - skip as u64)?;
            if let Some(sealer) = &file.sealer {
                sealer.open(place.wrapping_sub(skip as u64), &mut sectors);
            }
            if let Some(from) = sectors.get(skip..skip + part.len()) {
                part.copy_from_slice(from);
            }
        }
        Source::Compressed {
            file,
            offset,
            stored,
            codec,
            cluster_size,
            skip,
            ..
        } => {
            let mut packed = vec![0; *stored as usize];
            image
                .files()
                .get(*file)
                .ok_or_else(missing)?
                .read_at(&mut packed, offset.0)?;
            let cluster = crate::compress::expand(*codec, &packed, *cluster_size as usize)?;
            if let Some(from) = cluster.get(*skip as usize..*skip as usize + part.len()) {
                part.copy_from_slice(from);
            }
        }
    }
    Ok(())
}
