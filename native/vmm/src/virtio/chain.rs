// SPDX-License-Identifier: Apache-2.0
//! One descriptor chain, as a list of guest memory that the device may read and one that it may write.
//!
//! Drivers may cut a request into descriptors as they like (virtio 1.2, 2.7.4.2), so headers and status
//! bytes are taken off the ends of the lists, whatever the cuts. Everything here is an address the guest chose:
//! it is looked up in guest memory each time, and what is not RAM is a [`Fault`].

use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::queue::Fault;
use crate::memory::GuestMemoryMmap;

/// Guest memory, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// Segments in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(pub(super) Vec<Segment>);

impl Segments {
    /// Bytes in all.
    pub fn len(&self) -> u64 {
        // At most 2^16 segments of less than 2^32 bytes.
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The segments in order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.0.iter()
    }

    /// Takes the first `N` bytes off and returns what they hold; None when there are fewer.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not RAM.
    pub fn take_front<const N: usize>(
        &mut self,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<[u8; N]>, Fault> {
        let mut bytes = [0; N];
        let mut rest: &mut [u8] = &mut bytes;
        let mut used = 0;
        for segment in &mut self.0 {
            let len = rest.len().min(segment.len as usize);
            let (part, after) = rest.split_at_mut(len);
            memory.read_slice(part, GuestAddress(segment.address))?;
            segment.address = segment.address.wrapping_add(len as u64);
            segment.len = segment.len.wrapping_sub(len as u32);
            used += usize::from(segment.len == 0);
            rest = after;
            if rest.is_empty() {
                self.0.drain(..used);
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Takes the first `len` bytes off, as segments of their own; None, and nothing changes, when there are fewer.
    pub fn split_front(&mut self, len: u64) -> Option<Segments> {
        if self.len() < len {
            return None;
        }
        let (mut front, mut left) = (Vec::new(), len);
        let mut used = 0;
        for segment in &mut self.0 {
            if left == 0 {
                break;
            }
            let part = left.min(u64::from(segment.len)) as u32;
            front.push(Segment {
                address: segment.address,
                len: part,
            });
            left = left.wrapping_sub(u64::from(part));
            segment.address = segment.address.wrapping_add(u64::from(part));
            segment.len = segment.len.wrapping_sub(part);
            used += usize::from(segment.len == 0);
        }
        self.0.drain(..used);
        Some(Segments(front))
    }

    /// Takes the last byte off and returns its address; None when there is none.
    pub fn take_last_byte(&mut self) -> Option<u64> {
        let segment = self.0.last_mut()?;
        segment.len = segment.len.checked_sub(1)?;
        let address = segment.address.checked_add(u64::from(segment.len))?;
        if segment.len == 0 {
            self.0.pop();
        }
        Some(address)
    }

    /// Where the bytes are in this process.
    ///
    /// The pointers are good as long as `memory` is: guest memory is mapped until the machine is gone.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not RAM.
    pub fn iovecs(&self, memory: &GuestMemoryMmap) -> Result<SmallVec<[libc::iovec; 4]>, Fault> {
        let mut iovecs = SmallVec::with_capacity(self.0.len());
        for segment in &self.0 {
            let address = GuestAddress(segment.address);
            for slice in memory.get_slices(address, segment.len as usize) {
                let slice = slice?;
                iovecs.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(iovecs)
    }

    /// Copies what stands from byte `offset` on to `data`; returns how many bytes there were.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not RAM.
    pub fn read_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, Fault> {
        let len = data.len();
        let mut rest = data;
        for (address, piece) in self.pieces(offset) {
            let (part, after) = rest.split_at_mut(rest.len().min(piece as usize));
            memory.read_slice(part, GuestAddress(address))?;
            rest = after;
        }
        Ok(len.saturating_sub(rest.len()))
    }

    /// Copies `data` to where byte `offset` is; returns how many bytes fit.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not RAM.
    pub fn write_at(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, Fault> {
        let mut rest = data;
        for (address, piece) in self.pieces(offset) {
            let (part, after) = rest.split_at(rest.len().min(piece as usize));
            memory.write_slice(part, GuestAddress(address))?;
            rest = after;
        }
        Ok(data.len().saturating_sub(rest.len()))
    }

    /// Address and length of what there is from byte `offset` on.
    fn pieces(&self, offset: u64) -> impl Iterator<Item = (u64, u32)> + '_ {
        let mut skip = offset;
        self.0.iter().filter_map(move |segment| {
            let skipped = skip.min(u64::from(segment.len));
            skip = skip.saturating_sub(skipped);
            let len = segment.len.saturating_sub(skipped as u32);
            // An address that wraps around is not RAM.
            (len > 0).then(|| (segment.address.wrapping_add(skipped), len))
        })
    }

    /// Copies `data` to the front; returns how many bytes fit.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not RAM.
    pub fn write(&self, memory: &GuestMemoryMmap, data: &[u8]) -> Result<u32, Fault> {
        let mut rest = data;
        let mut written: u32 = 0;
        for segment in &self.0 {
            let (part, after) = rest.split_at(rest.len().min(segment.len as usize));
            memory.write_slice(part, GuestAddress(segment.address))?;
            written = written.saturating_add(part.len() as u32);
            rest = after;
        }
        Ok(written)
    }
}

/// A request as the driver made it available.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The head descriptor, which names the chain in the used ring.
    pub head: u16,
    /// What the device may read.
    pub readable: Segments,
    /// What the device may write.
    pub writable: Segments,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        // Two regions side by side: a buffer may cross the border.
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    fn segments(list: &[(u64, u32)]) -> Segments {
        let segments = list.iter();
        Segments(
            segments
                .map(|&(address, len)| Segment { address, len })
                .collect(),
        )
    }

    #[test]
    fn a_header_is_taken_across_any_cut() {
        let memory = memory();
        memory.write_slice(&[1, 2, 3], GuestAddress(0x10)).unwrap();
        memory.write_slice(&[4, 5], GuestAddress(0x40)).unwrap();
        let mut list = segments(&[(0x10, 3), (0x40, 2)]);
        assert_eq!(list.take_front::<4>(&memory).unwrap(), Some([1, 2, 3, 4]));
        assert_eq!(list, segments(&[(0x41, 1)]));
        assert_eq!(list.take_front::<2>(&memory).unwrap(), None);
    }

    #[test]
    fn the_front_is_split_off_across_any_cut() {
        let mut list = segments(&[(0x10, 3), (0x40, 4)]);
        assert_eq!(list.split_front(8), None);
        let front = list.split_front(5);
        assert_eq!(front, Some(segments(&[(0x10, 3), (0x40, 2)])));
        assert_eq!(list, segments(&[(0x42, 2)]));
        assert_eq!(list.split_front(2), Some(segments(&[(0x42, 2)])));
        assert!(list.is_empty());
        assert_eq!(list.split_front(0), Some(segments(&[])));
    }

    #[test]
    fn the_status_byte_is_the_last_one() {
        let mut list = segments(&[(0x10, 2), (0x40, 1)]);
        assert_eq!(list.take_last_byte(), Some(0x40));
        assert_eq!(list.take_last_byte(), Some(0x11));
        assert_eq!(list, segments(&[(0x10, 1)]));
        assert_eq!(list.take_last_byte(), Some(0x10));
        assert_eq!(list.take_last_byte(), None);
    }

    #[test]
    fn iovecs_are_cut_at_region_borders_and_refused_outside() {
        let memory = memory();
        let iovecs = segments(&[(0xf00, 0x200)]).iovecs(&memory).unwrap();
        let total: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        assert_eq!(total, 0x200);
        for (address, len) in [(0x1fff, 2), (0x2000, 1), (u64::MAX, 1), (u64::MAX, 2)] {
            assert!(segments(&[(address, len)]).iovecs(&memory).is_err());
        }
    }

    #[test]
    fn bytes_are_reached_in_the_middle_across_any_cut() {
        let memory = memory();
        let list = segments(&[(0x100, 3), (0x200, 1), (0x300, 4)]);
        assert_eq!(list.write_at(&memory, 2, &[1, 2, 3]).unwrap(), 3);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x102)).unwrap(), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x200)).unwrap(), 2);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x300)).unwrap(), 3);
        let mut data = [0; 9];
        assert_eq!(list.read_at(&memory, 2, &mut data).unwrap(), 6);
        assert_eq!(data[..3], [1, 2, 3]);
        assert_eq!(list.write_at(&memory, 8, &[1]).unwrap(), 0);
        assert!(segments(&[(0x2000, 2)]).write_at(&memory, 1, &[1]).is_err());
    }

    #[test]
    fn a_write_stops_at_the_end_of_either() {
        let memory = memory();
        let list = segments(&[(0x100, 2), (0x200, 2)]);
        assert_eq!(list.write(&memory, &[1, 2, 3]).unwrap(), 3);
        assert_eq!(list.write(&memory, &[9; 10]).unwrap(), 4);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x200)).unwrap(), 0x0909);
        assert!(segments(&[(0x2000, 2)]).write(&memory, &[1]).is_err());
    }
}
