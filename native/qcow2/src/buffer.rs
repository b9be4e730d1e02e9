// SPDX-License-Identifier: Apache-2.0
//! Memory of our own for metadata and bounced data, aligned to 4 KiB so that O_DIRECT takes it,
//! and the arithmetic on lists of iovecs.

use smallvec::SmallVec;

pub(crate) const PAGE: usize = 4096;

/// A list of pieces of memory.
pub(crate) type IoVecs = SmallVec<[libc::iovec; 4]>;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Zeroed memory aligned to 4096 bytes.
#[derive(Clone)]
pub(crate) struct Buffer {
    pages: Vec<Page>,
    len: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Buffer {
    pub(crate) fn zeroed(len: usize) -> Buffer {
        Buffer {
            pages: vec![Page([0; PAGE]); len.div_ceil(PAGE)],
            len,
        }
    }

    /// The most bytes it can hold.
    pub(crate) fn room(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// Be `len` bytes long, at most its room; what is in it stays.
    pub(crate) fn resize(&mut self, len: usize) {
        self.len = len.min(self.room());
    }

    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::zeroed(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: Page is 4096 plain bytes without padding, and len never exceeds the pages.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as bytes(), and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.len) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// An iovec over `range` of this buffer; empty when the range is outside.
    pub(crate) fn iovec(&mut self, start: usize, len: usize) -> libc::iovec {
        let slice = self
            .bytes_mut()
            .get_mut(start..start.saturating_add(len))
            .unwrap_or(&mut []);
        libc::iovec {
            iov_base: slice.as_mut_ptr().cast(),
            iov_len: slice.len(),
        }
    }
}

/// The pieces that make up `len` bytes from byte `skip` on.
pub(crate) fn subrange(pieces: &[libc::iovec], skip: u64, len: u64) -> IoVecs {
    let (mut skip, mut len) = (skip as usize, len as usize);
    let mut result = IoVecs::new();
    for piece in pieces {
        if len == 0 {
            break;
        }
        if skip >= piece.iov_len {
            skip -= piece.iov_len;
            continue;
        }
        let take = (piece.iov_len - skip).min(len);
        result.push(libc::iovec {
            iov_base: piece.iov_base.cast::<u8>().wrapping_add(skip).cast(),
            iov_len: take,
        });
        len -= take;
        skip = 0;
    }
    result
}

/// The sum of the pieces' lengths; None when it does not fit.
pub(crate) fn total(pieces: &[libc::iovec]) -> Option<u64> {
    pieces
        .iter()
        .try_fold(0u64, |sum, piece| sum.checked_add(piece.iov_len as u64))
}

/// Whether the kernel would refuse these pieces: more than IOV_MAX of them (with room for a head and
/// a tail), or not aligned to the `unit` of an O_DIRECT file.
pub(crate) fn refused(pieces: &[libc::iovec], unit: usize) -> bool {
    let bad = |piece: &libc::iovec| (piece.iov_base as usize | piece.iov_len) % unit.max(1) != 0;
    pieces.len() > 1000 || unit > 1 && pieces.iter().any(bad)
}

/// Fill the pieces with zeros.
///
/// # Safety
/// The pieces are writable memory that nobody holds a reference into.
pub(crate) unsafe fn fill_zero(pieces: &[libc::iovec]) {
    for piece in pieces {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
    }
}

/// Copy `data` over the pieces, as far as both reach.
///
/// # Safety
/// As [`fill_zero`].
pub(crate) unsafe fn scatter(data: &[u8], pieces: &[libc::iovec]) {
    let mut rest = data;
    for piece in pieces {
        let (now, later) = rest.split_at(piece.iov_len.min(rest.len()));
        // SAFETY: the caller's promise; `now` is not longer than the piece.
        unsafe { std::ptr::copy(now.as_ptr(), piece.iov_base.cast::<u8>(), now.len()) };
        rest = later;
    }
}

/// Copy the pieces into `data`, as far as both reach.
///
/// # Safety
/// The pieces are readable memory.
pub(crate) unsafe fn gather(pieces: &[libc::iovec], data: &mut [u8]) {
    let mut rest = data;
    for piece in pieces {
        let (now, later) = rest.split_at_mut(piece.iov_len.min(rest.len()));
        // SAFETY: the caller's promise; `now` is not longer than the piece.
        unsafe { std::ptr::copy(piece.iov_base.cast::<u8>(), now.as_mut_ptr(), now.len()) };
        rest = later;
    }
}

/// Whether all bytes are zero. Memory that changes meanwhile is looked at once, in a copy.
///
/// # Safety
/// The pieces are readable memory.
pub(crate) unsafe fn all_zero(pieces: &[libc::iovec]) -> bool {
    let mut copy = [0u64; 64];
    pieces.iter().all(|piece| {
        (0..piece.iov_len).step_by(512).all(|at| {
            let len = (piece.iov_len - at).min(512);
            copy.fill(0);
            // SAFETY: the caller's promise; `len` bytes from `at` lie in the piece, and fit.
            unsafe {
                let from = piece.iov_base.cast::<u8>().add(at);
                std::ptr::copy(from, copy.as_mut_ptr().cast::<u8>(), len);
            }
            copy.iter().all(|word| *word == 0)
        })
    })
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_that_is_not_zero_is_found_anywhere() {
        for at in [0, 511, 512, 1000, 1300] {
            let mut memory = Buffer::zeroed(1301);
            let pieces = [memory.iovec(0, 600), memory.iovec(600, 701)];
            // SAFETY: the buffer's own memory.
            assert!(unsafe { all_zero(&pieces) });
            memory.bytes_mut()[at] = 1;
            // SAFETY: the same.
            assert!(!unsafe { all_zero(&pieces) }, "{at}");
        }
    }

    #[test]
    fn a_subrange_spans_pieces() {
        let mut memory = Buffer::from_bytes(b"abcdefghij");
        let pieces = [memory.iovec(0, 3), memory.iovec(3, 4), memory.iovec(7, 3)];
        let part = subrange(&pieces, 2, 6);
        assert_eq!(part.len(), 3);
        let mut out = [0u8; 6];
        // SAFETY: the pieces lie in `memory`.
        unsafe { gather(&part, &mut out) };
        assert_eq!(&out, b"cdefgh");
    }

    #[test]
    fn buffers_are_aligned_for_direct_io() {
        let mut memory = Buffer::zeroed(100);
        assert_eq!(memory.iovec(0, 100).iov_base as usize % PAGE, 0);
        assert_eq!(memory.iovec(90, 20).iov_len, 0);
    }
}
