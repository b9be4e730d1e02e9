// SPDX-License-Identifier: Apache-2.0
//! Tickets: clusters that are being written before they are mapped. While one is out, other writes to the same guest clusters
//! wait, and reads go on with the old mapping; when the data is written they are mapped, and what they were
//! mapped to before is freed.

use crate::cache::Class;
use crate::error::Error;
use crate::mailbox::Waiter;
use crate::qcow2::entry::{L2Entry, Mapping, Part, SUBCLUSTERS};
use crate::qcow2::mapping::l2_place;
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{GuestCluster, HostOffset};

/// An allocation under way.
pub(crate) struct Ticket {
    pub(super) first: GuestCluster,
    pub(super) count: u64,
    pub(super) table: HostOffset,
    pub(super) host: HostOffset,
    /// What of the clusters becomes data.
    pub(super) parts: Written,
    /// The clusters were those of a zero cluster before, or lie in an external data file: they
    /// need no counting down when the write fails.
    pub(super) kept: bool,
    /// What must be on disk before the mapping.
    pub(super) class: Class,
    /// A packed cluster: its L2 entry, and its bytes on the host.
    pub(super) packed: Option<(L2Entry, u64)>,
    pub(super) waiters: Vec<Waiter>,
}

impl Ticket {
    /// One packed cluster of `len` bytes.
    pub(crate) fn packed(
        first: GuestCluster,
        table: HostOffset,
        host: HostOffset,
        len: u64,
        entry: L2Entry,
    ) -> Ticket {
        Ticket {
            first,
            count: 1,
            table,
            host,
            parts: Written::ALL,
            kept: false,
            class: Class::Mapping,
            packed: Some((entry, len)),
            waiters: Vec::new(),
        }
    }
}

/// Which subclusters of a run of clusters are written: from `from` of the first to `until` of the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written {
    pub(super) from: u32,
    pub(super) until: u32,
}

impl Written {
    pub(super) const ALL: Written = Written {
        from: 0,
        until: SUBCLUSTERS,
    };

    /// Those of the `n`th of `count` clusters.
    fn of(&self, n: u64, count: u64) -> std::ops::Range<u32> {
        let from = if n == 0 { self.from } else { 0 };
        let until = if n + 1 == count {
            self.until
        } else {
            SUBCLUSTERS
        };
        from..until
    }
}

impl State {
    pub(crate) fn issue(&mut self, geometry: &Geometry, ticket: Ticket) -> Result<u64, Error> {
        let index = ticket.first.0 % geometry.l2_entries();
        let (block, _) = l2_place(geometry, ticket.table, index);
        self.cache.pin(geometry.layer, block.offset);
        let writer = self.writer()?;
        let number = writer.next_ticket;
        writer.next_ticket += 1;
        for n in 0..ticket.count {
            writer.busy.insert(GuestCluster(ticket.first.0 + n), number);
        }
        writer.tickets.insert(number, ticket);
        Ok(number)
    }

    /// The data of an allocation is written (or not): map it (or give it back).
    pub(crate) fn finish(&mut self, number: u64, ok: bool) {
        let Some(writer) = &mut self.writer else {
            return;
        };
        let geometry = writer.geometry;
        let Some(ticket) = writer.tickets.remove(&number) else {
            return;
        };
        for n in 0..ticket.count {
            writer.busy.remove(&GuestCluster(ticket.first.0 + n));
        }
        let bytes = ticket
            .packed
            .map_or(ticket.count * geometry.cluster(), |(_, len)| len);
        match (ok, ticket.packed) {
            (true, Some((entry, _))) => {
                let index = ticket.first.0 % geometry.l2_entries();
                self.replace(&geometry, ticket.table, index, entry, (true, ticket.class));
            }
            (true, None) => self.link(&geometry, &ticket),
            (false, _) if !ticket.kept => {
                writer
                    .freed
                    .push(refcount::clusters(&geometry, ticket.host, bytes))
            }
            (false, _) => {}
        }
        let index = ticket.first.0 % geometry.l2_entries();
        let (block, _) = l2_place(&geometry, ticket.table, index);
        self.cache.unpin(geometry.layer, block.offset);
        ticket.waiters.into_iter().for_each(Waiter::wake);
    }

    /// Map the clusters of a ticket; what they were mapped to before is freed, unless it is the same cluster.
    fn link(&mut self, geometry: &Geometry, ticket: &Ticket) {
        for n in 0..ticket.count {
            let index = (ticket.first.0 + n) % geometry.l2_entries();
            let host = ticket.host.plus(n * geometry.cluster());
            let old = self.mapped(geometry, ticket.table, index).parts();
            let stays = if ticket.kept { old } else { old.without_data() };
            let parts = stays.with(ticket.parts.of(n, ticket.count), Part::Data);
            let entry = L2Entry::parts(geometry, Some((host, true)), parts);
            let how = (!ticket.kept, ticket.class);
            self.replace(geometry, ticket.table, index, entry, how);
        }
    }

    fn replace(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        entry: L2Entry,
        (free_old, class): (bool, Class),
    ) {
        let old = self.mapped(geometry, table, index);
        self.set_l2_entry_as(geometry, table, index, entry, class);
        if free_old {
            self.free_mapping(geometry, old);
        }
    }

    /// What an entry in the cache says.
    pub(super) fn mapped(&self, geometry: &Geometry, table: HostOffset, index: u64) -> Mapping {
        self.cached_l2_entry(geometry, table, index)
            .and_then(|entry| entry.decode(geometry).ok())
            .unwrap_or(Mapping::Unallocated)
    }

    /// As [`State::free_mapping`], where the guest does not need the data any more: space that was the
    /// cluster's alone goes back to the host, if that is wanted.
    pub(crate) fn discard_mapping(&mut self, geometry: &Geometry, mapping: Mapping) {
        if self.check_freed(geometry, mapping).is_err() {
            return;
        }
        let Some((alone, true)) = mapping.host() else {
            return self.free_mapping(geometry, mapping);
        };
        match &mut self.writer {
            Some(writer) if self.discard && !geometry.external_data() => {
                writer
                    .freed
                    .give_back(refcount::clusters(geometry, alone, geometry.cluster()));
            }
            _ => self.free_mapping(geometry, mapping),
        }
    }

    /// What a replaced mapping pointed to loses a pointer.
    pub(crate) fn free_mapping(&mut self, geometry: &Geometry, mapping: Mapping) {
        if self.check_freed(geometry, mapping).is_err() {
            return;
        }
        let Some(range) = host_clusters(geometry, mapping) else {
            return;
        };
        if let Some(writer) = &mut self.writer {
            writer.freed.push(range);
        }
    }
}

/// The clusters of the image file that a mapping points to.
pub(super) fn host_clusters(geometry: &Geometry, mapping: Mapping) -> Option<std::ops::Range<u64>> {
    match (mapping, mapping.host()) {
        (Mapping::Compressed { host, stored }, _) => {
            Some(refcount::clusters(geometry, host, stored))
        }
        (_, Some((host, _))) if !geometry.external_data() => {
            Some(refcount::clusters(geometry, host, geometry.cluster()))
        }
        _ => None,
    }
}
