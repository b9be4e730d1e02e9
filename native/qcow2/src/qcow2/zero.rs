// SPDX-License-Identifier: Apache-2.0
//! Planning discards and zeroes: whole clusters by their mapping alone, the rest as writes of zeros.
//!
//! A cluster's mapping becomes "zero" (or "unallocated" where nothing lies below); the host cluster
//! is freed, or kept with the mapping when the guest does not allow unmapping. A discard may be
//! left undone, so it never writes data and never makes tables.
//!
//! With subclusters the unit of zeroes is one of these: their bits are set, and the host cluster, ours alone or
//! not, keeps what the others have in it. The unit of discards stays the cluster, as QEMU has it.

use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Extents, Planned, Stop, ZeroStep};
use crate::qcow2::entry::{L2Entry, Mapping, Part};
use crate::qcow2::write::zeros;
use crate::qcow2::Geometry;
use crate::state::State;
use crate::types::GuestCluster;

/// What a zeroing request asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Zeroing {
    /// The range must read as zeros (write zeroes), not only may (discard).
    pub(crate) required: bool,
    /// Space may be given back.
    pub(crate) unmap: bool,
}

/// What is to happen to one cluster.
enum Change {
    None,
    Entry { entry: L2Entry, free: bool },
    Write,
}

impl State {
    pub(crate) fn plan_zero_qcow2(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        at: u64,
        len: u64,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        let size = geometry.cluster();
        let first = GuestCluster(at >> geometry.cluster_bits);
        self.check_sound()?;
        self.wait_if_busy(first, waiter)?;
        let to_next = size - at % size;
        let at_end = at + len == self.size();
        let partial = at % size != 0 || (len < size && !at_end);
        if partial && geometry.extended_l2 && how.required && !geometry.external_data() {
            let step = to_next.min(len);
            return self.zero_subclusters(geometry, files, at, step, waiter);
        }
        if partial || geometry.external_data() {
            let step = if partial {
                to_next.min(len)
            } else {
                len.min(size)
            };
            return self.zero_by_writing(at, step, how, waiter);
        }
        if self.cache.crowded() || self.too_much_freed() {
            return Err(Stop::Commit);
        }
        self.zero_clusters(geometry, files, at, len, how, waiter)
    }

    /// Zeros are written where there are not zeros already.
    fn zero_by_writing(
        &mut self,
        at: u64,
        len: u64,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        let mut content = Extents::new();
        self.resolve(0, at, len, waiter, &mut content)?;
        let write = how.required && !zeros(&content);
        Ok(if write {
            ZeroStep::Write { len }
        } else {
            ZeroStep::Done { len }
        })
    }

    /// `len` bytes within one cluster: whole subclusters by their bits.
    fn zero_subclusters(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        at: u64,
        len: u64,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        let required = Zeroing {
            required: true,
            unmap: false,
        };
        let (unit, skip) = (geometry.subcluster(), at % geometry.cluster());
        if skip % unit != 0 || (len < unit && at + len != self.size()) {
            let step = (unit - skip % unit).min(len);
            return self.zero_by_writing(at, step, required, waiter);
        }
        // To the last whole subcluster; the disk's last one may be cut short.
        let whole = if at + len == self.size() {
            len
        } else {
            len / unit * unit
        };
        let mut content = Extents::new();
        self.resolve(0, at, whole, waiter, &mut content)?;
        if zeros(&content) {
            return Ok(ZeroStep::Done { len: whole });
        }
        if self.cache.crowded() || self.too_much_freed() {
            return Err(Stop::Commit);
        }
        let cluster = GuestCluster(at >> geometry.cluster_bits);
        let mapping = self.lookup(geometry, cluster, waiter)?;
        if matches!(mapping, Mapping::Compressed { .. }) {
            return Ok(ZeroStep::Write { len: whole });
        }
        let table = self.writable_l2(geometry, files, cluster, waiter)?;
        let range = (skip / unit) as u32..(skip + whole).div_ceil(unit) as u32;
        let parts = mapping.parts().with(range, Part::Zero);
        let entry = L2Entry::parts(geometry, mapping.host(), parts);
        self.set_l2_entry(geometry, table, cluster.0 % geometry.l2_entries(), entry);
        Ok(ZeroStep::Done { len: whole })
    }

    /// Whole clusters, within one cached block of the L2 table.
    fn zero_clusters(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        at: u64,
        len: u64,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<ZeroStep> {
        let size = geometry.cluster();
        let first = at >> geometry.cluster_bits;
        let per_block = geometry.l2_per_block();
        let until = first / per_block * per_block + per_block;
        let mut done = 0;
        for cluster in (first..until).map(GuestCluster) {
            let rest = len - done;
            let whole = rest >= size || (rest > 0 && at + len == self.size());
            if !whole || (done > 0 && self.busy(cluster)) {
                break;
            }
            let change = match self.zero_change(geometry, cluster, how, waiter) {
                Ok(change) => change,
                // What was changed so far is complete in itself.
                Err(stop) if done > 0 => {
                    self.drop_stop(stop);
                    break;
                }
                Err(stop) => return Err(stop),
            };
            match change {
                Change::None => {}
                Change::Write if done > 0 => break,
                Change::Write => {
                    return Ok(ZeroStep::Write {
                        len: rest.min(size),
                    })
                }
                Change::Entry { entry, free } => {
                    let table = match self.writable_l2(geometry, files, cluster, waiter) {
                        Ok(table) => table,
                        Err(stop) if done > 0 => {
                            self.drop_stop(stop);
                            break;
                        }
                        Err(stop) => return Err(stop),
                    };
                    let old = self.lookup(geometry, cluster, waiter)?;
                    if free {
                        self.check_freed(geometry, old)?;
                    }
                    self.set_l2_entry(geometry, table, cluster.0 % geometry.l2_entries(), entry);
                    if free {
                        self.discard_mapping(geometry, old);
                    }
                }
            }
            done += rest.min(size);
        }
        Ok(ZeroStep::Done { len: done })
    }

    fn zero_change(
        &mut self,
        geometry: &Geometry,
        cluster: GuestCluster,
        how: Zeroing,
        waiter: &Waiter,
    ) -> Planned<Change> {
        let mapping = self.lookup(geometry, cluster, waiter)?;
        let below = self.layers.len() > geometry.layer + 1;
        let has_zero = geometry.version >= 3;
        let nothing = L2Entry::default();
        let zeroed = L2Entry::zeros(geometry, None);
        Ok(match mapping {
            Mapping::Unallocated if !how.required || !below => Change::None,
            Mapping::Unallocated => {
                let start = cluster.0 << geometry.cluster_bits;
                let mut content = Extents::new();
                self.resolve(
                    geometry.layer + 1,
                    start,
                    geometry.cluster(),
                    waiter,
                    &mut content,
                )?;
                match (zeros(&content), has_zero) {
                    (true, _) => Change::None,
                    (false, true) => Change::Entry {
                        entry: zeroed,
                        free: false,
                    },
                    (false, false) => Change::Write,
                }
            }
            Mapping::Zero { host: Some(_), .. } if how.unmap => Change::Entry {
                entry: zeroed,
                free: true,
            },
            Mapping::Zero { .. } => Change::None,
            Mapping::Data { host, copied: true }
            | Mapping::Split {
                host: Some(host),
                copied: true,
                ..
            } if has_zero && !how.unmap => Change::Entry {
                entry: L2Entry::zeros(geometry, Some(host)),
                free: false,
            },
            Mapping::Data { .. } if !how.unmap && !has_zero => Change::Write,
            Mapping::Data { .. } | Mapping::Compressed { .. } | Mapping::Split { .. } => {
                match (below, has_zero) {
                    (false, _) => Change::Entry {
                        entry: nothing,
                        free: true,
                    },
                    (true, true) => Change::Entry {
                        entry: zeroed,
                        free: true,
                    },
                    (true, false) if how.required => Change::Write,
                    (true, false) => Change::None,
                }
            }
        })
    }
}
