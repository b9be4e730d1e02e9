// SPDX-License-Identifier: Apache-2.0
//! Writing compressed clusters: packed one behind the other, several in a host cluster, each of
//! which counts once for every host cluster that it touches.
//!
//! As everywhere the count is raised first, then the data is written, and only then the mapping
//! changes; a crash between leaves a count too high.

use std::ops::Range;

use crate::error::{Error, Kind};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::entry::L2Entry;
use crate::qcow2::ticket::Ticket;
use crate::qcow2::Geometry;
use crate::state::{Layer, State};
use crate::types::{GuestCluster, HostCluster, HostOffset};

/// Where a packed cluster goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    pub(crate) ticket: u64,
    pub(crate) file: usize,
    pub(crate) offset: HostOffset,
}

impl State {
    /// Room for a guest cluster that compresses to `len` bytes. The engine writes there, then
    /// reports under the ticket as for any allocation.
    pub(crate) fn plan_packed(
        &mut self,
        files: &[BlockFile],
        cluster: GuestCluster,
        len: u64,
        waiter: &Waiter,
    ) -> Planned<Packed> {
        let geometry = match self.layers.first() {
            Some(Layer::Qcow2(qcow2)) => qcow2.geometry,
            _ => {
                return Err(Stop::Fail(Error::unsupported(
                    "compressed writes to a raw image",
                )))
            }
        };
        if geometry.sealed() {
            return Err(Stop::Fail(Error::unsupported(
                "compressed writes to an encrypted image",
            )));
        }
        if geometry.external_data() {
            return Err(Stop::Fail(Error::unsupported(
                "compressed writes with an external data file",
            )));
        }
        if len == 0 || len >= geometry.cluster() {
            return Err(Stop::Fail(Error::new(
                Kind::InvalidArgument,
                "a packed cluster is smaller than a cluster",
            )));
        }
        if self.cache.crowded() || self.too_much_freed() {
            return Err(Stop::Commit);
        }
        self.wait_if_busy(cluster, waiter)?;
        let table = self.writable_l2(&geometry, files, cluster, waiter)?;
        let offset = self.packed_room(&geometry, files, len, waiter)?;
        let entry = L2Entry::compressed(&geometry, offset, len);
        let ticket = self.issue(
            &geometry,
            Ticket::packed(cluster, table, offset, len, entry),
        )?;
        let start = cluster.0 << geometry.cluster_bits;
        let end = self.size().min(start + geometry.cluster());
        self.mark_dirty(start, end.saturating_sub(start));
        Ok(Packed {
            ticket,
            file: geometry.file,
            offset,
        })
    }

    /// `len` bytes behind the last packed cluster, or in a new host cluster.
    fn packed_room(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        len: u64,
        waiter: &Waiter,
    ) -> Planned<HostOffset> {
        let size = geometry.cluster();
        if let Some(tail) = self.writer()?.packed_tail {
            let here = HostCluster(tail.0 >> geometry.cluster_bits);
            let count = self.refcount(geometry, here, waiter)?;
            let usable = count > 0 && count < geometry.max_refcount();
            let room = size - tail.0 % size;
            if usable && len <= room {
                self.set_refcount(geometry, here, count + 1);
                self.writer()?.packed_tail = (len < room).then(|| tail.plus(len));
                return Ok(tail);
            }
            let next = self.allocate(files, 1, waiter)?.first;
            // Still under the same lock, but allocating may have let go of nothing: count again.
            if usable && next.0 == here.0 + 1 {
                self.set_refcount(geometry, here, count + 1);
                self.writer()?.packed_tail = Some(tail.plus(len));
                return Ok(tail);
            }
            return Ok(self.begin_packed(geometry, next, len));
        }
        let first = self.allocate(files, 1, waiter)?.first;
        Ok(self.begin_packed(geometry, first, len))
    }

    /// No more is packed into one of these clusters, which may be free: it may be anything next.
    pub(crate) fn forget_packed(&mut self, geometry: &Geometry, clusters: Range<u64>) {
        if let Some(writer) = &mut self.writer {
            writer
                .packed_tail
                .take_if(|tail| clusters.contains(&(tail.0 >> geometry.cluster_bits)));
        }
    }

    fn begin_packed(&mut self, geometry: &Geometry, cluster: HostCluster, len: u64) -> HostOffset {
        let offset = HostOffset(cluster.0 << geometry.cluster_bits);
        if let Some(writer) = &mut self.writer {
            writer.packed_tail = Some(offset.plus(len));
        }
        offset
    }
}
