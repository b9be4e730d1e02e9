// SPDX-License-Identifier: Apache-2.0
//! virtio-blk (virtio 1.2, 5.2): what a disk shows the guest and what its requests mean.
//!
//! This file does no I/O: [`read_request`] turns a chain into an image operation on guest memory or into a
//! status. The disk is write-back with a flush command; a driver that does not know the flush command gets
//! every write on stable storage before it completes (5.2.6.2). Limits are the machine type's, chosen so that
//! the largest legal request stays below what one read or write system call takes.
//!
//! Left out: the legacy interface, geometry, lifetime, secure erase, zones, and a cache that the guest switches.

use smallvec::SmallVec;
use vmbus_qcow2::Op;

use super::chain::Chain;
use super::queue::{self, Fault};
use super::{Model, F_RING};
use crate::memory::GuestMemoryMmap;

/// Bytes of a sector, the unit of all addresses.
pub const SECTOR: u64 = 512;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Data segments of a request: a full queue without header and status.
const SEGMENTS: u32 = queue::SIZE_MAX as u32 - 2;
/// Bytes of a segment.
const SEGMENT_SIZE: u32 = 1 << 20;
/// Bytes of data in a request.
const DATA_MAX: u64 = SEGMENTS as u64 * SEGMENT_SIZE as u64;
/// Sectors in one discard or write zeroes: 2 GiB.
const RANGE_MAX: u32 = 1 << 22;
/// Sectors that a discard is best aligned to: the usual cluster of an image, 64 KiB.
const DISCARD_ALIGNMENT: u32 = 128;
/// Bytes of the serial number.
pub const SERIAL: usize = 20;

/// VIRTIO_BLK_S_OK.
pub const STATUS_OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const STATUS_IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const STATUS_UNSUPPORTED: u8 = 2;

/// A disk, as its requests are checked against it.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Sectors.
    pub capacity: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// At most 20 characters; the rest is zero.
    pub serial: [u8; SERIAL],
}

impl Disk {
    /// A disk of `bytes` (what does not fill a sector is not shown), with the serial number's first 20 bytes.
    pub fn new(bytes: u64, read_only: bool, serial: &str) -> Disk {
        let mut place = [0; SERIAL];
        for (byte, value) in place.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        Disk {
            capacity: bytes / SECTOR,
            read_only,
            serial: place,
        }
    }

    /// What the guest sees, with `queues` virtqueues.
    pub fn model(&self, queues: u16) -> Model {
        let mut config = Vec::with_capacity(60);
        config.extend_from_slice(&self.capacity.to_le_bytes());
        config.extend_from_slice(&SEGMENT_SIZE.to_le_bytes());
        config.extend_from_slice(&SEGMENTS.to_le_bytes());
        // No geometry.
        config.extend_from_slice(&[0; 4]);
        config.extend_from_slice(&(SECTOR as u32).to_le_bytes());
        // Topology: physical blocks of 8 sectors, no offset, 8 sectors at least, no optimum.
        config.extend_from_slice(&[3, 0, 8, 0, 0, 0, 0, 0]);
        // Write-back; one byte unused.
        config.extend_from_slice(&[1, 0]);
        config.extend_from_slice(&queues.to_le_bytes());
        // Discard: sectors, segments, alignment.
        for value in [RANGE_MAX, 1, DISCARD_ALIGNMENT] {
            config.extend_from_slice(&value.to_le_bytes());
        }
        // Write zeroes: sectors, segments, may unmap.
        for value in [RANGE_MAX, 1, 1] {
            config.extend_from_slice(&value.to_le_bytes());
        }
        let changes = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
        Model {
            device_type: 2,
            class: 0x018000,
            features: F_RING
                | F_SIZE_MAX
                | F_SEG_MAX
                | F_BLK_SIZE
                | F_TOPOLOGY
                | F_MQ
                | if self.read_only {
                    F_RO | F_FLUSH
                } else {
                    changes
                },
            queues,
            queue_size: queue::SIZE_MAX,
            config,
            live: None,
        }
    }
}

/// Where the configuration has the capacity, in sectors.
pub const CAPACITY: usize = 0;

/// What is to be done with a request.
pub struct BlkRequest {
    /// Where the status byte goes.
    pub status: u64,
    /// What to do.
    pub work: Work,
}

/// The work of a request.
pub enum Work {
    /// It is over, with this status and this many bytes written before the status byte.
    Done(u8, u32),
    /// An operation on the image.
    Image(ImageWork),
}

/// An operation on the image.
pub struct ImageWork {
    /// What to do.
    pub op: Op,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Guest memory of `len` bytes in all, for reads and writes.
    pub buffers: SmallVec<[libc::iovec; 4]>,
}

/// Understands a chain as a request to `disk`, from a driver that accepted `features`.
///
/// # Errors
/// A [`Fault`] when there is no header, no status byte, or an address that is not RAM; what can be answered with
/// a status is.
pub fn read_request(
    mut chain: Chain,
    memory: &GuestMemoryMmap,
    disk: &Disk,
    features: u64,
) -> Result<BlkRequest, Fault> {
    let header = chain.readable.take_front::<16>(memory)?;
    let status = chain.writable.take_last_byte();
    let (Some(header), Some(status)) = (header, status) else {
        return Err(Fault::Request);
    };
    let header = u128::from_le_bytes(header);
    let kind = header as u32;
    let sector = (header >> 64) as u64;
    let ioerr = Work::Done(STATUS_IOERR, 0);
    let unsupported = Work::Done(STATUS_UNSUPPORTED, 0);
    let work = match kind {
        TYPE_IN => match data_range(disk, sector, chain.writable.len()) {
            Some((_, 0)) => Work::Done(STATUS_OK, 0),
            Some((offset, len)) => Work::Image(ImageWork {
                op: Op::Read,
                offset,
                len,
                buffers: chain.writable.iovecs(memory)?,
            }),
            None => ioerr,
        },
        TYPE_OUT if disk.read_only => ioerr,
        TYPE_OUT => match data_range(disk, sector, chain.readable.len()) {
            Some((_, 0)) => Work::Done(STATUS_OK, 0),
            Some((offset, len)) => Work::Image(ImageWork {
                op: Op::Write {
                    fua: features & F_FLUSH == 0,
                },
                offset,
                len,
                buffers: chain.readable.iovecs(memory)?,
            }),
            None => ioerr,
        },
        TYPE_FLUSH => image(Op::Flush, 0, 0),
        TYPE_GET_ID => Work::Done(STATUS_OK, chain.writable.write(memory, &disk.serial)?),
        TYPE_DISCARD | TYPE_WRITE_ZEROES if disk.read_only => ioerr,
        TYPE_DISCARD | TYPE_WRITE_ZEROES => {
            let segment = chain.readable.take_front::<16>(memory)?;
            match segment.filter(|_| chain.readable.is_empty()) {
                Some(segment) => range_work(disk, kind, segment),
                None => ioerr,
            }
        }
        _ => unsupported,
    };
    Ok(BlkRequest { status, work })
}

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// The one segment of a discard or write zeroes: sector, sectors, flags.
fn range_work(disk: &Disk, kind: u32, segment: [u8; 16]) -> Work {
    const UNMAP: u32 = 1;
    let segment = u128::from_le_bytes(segment);
    let sectors = (segment >> 64) as u32;
    let flags = (segment >> 96) as u32;
    let op = match (kind, flags) {
        (TYPE_DISCARD, 0) => Op::Discard,
        (TYPE_WRITE_ZEROES, 0 | UNMAP) => Op::WriteZeroes {
            unmap: flags == UNMAP,
        },
        // Unknown flags, or unmap in a discard (5.2.6.2).
        _ => return Work::Done(STATUS_UNSUPPORTED, 0),
    };
    match range(
        disk,
        segment as u64,
        u64::from(sectors).saturating_mul(SECTOR),
    ) {
        Some((_, 0)) => Work::Done(STATUS_OK, 0),
        Some((offset, len)) if sectors <= RANGE_MAX => image(op, offset, len),
        _ => Work::Done(STATUS_IOERR, 0),
    }
}

fn image(op: Op, offset: u64, len: u64) -> Work {
    Work::Image(ImageWork {
        op,
        offset,
        len,
        buffers: SmallVec::new(),
    })
}

/// Offset and length in bytes of whole sectors on the disk, if they are.
fn data_range(disk: &Disk, sector: u64, len: u64) -> Option<(u64, u64)> {
    (len <= DATA_MAX).then_some(())?;
    range(disk, sector, len)
}

fn range(disk: &Disk, sector: u64, len: u64) -> Option<(u64, u64)> {
    let end = sector.checked_add(len / SECTOR)?;
    let fits = len % SECTOR == 0 && end <= disk.capacity;
    fits.then(|| sector.checked_mul(SECTOR))
        .flatten()
        .map(|offset| (offset, len))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::queue::testing::{memory, rings, Driver};
    use super::super::queue::{Queue, RingFeatures};
    use super::*;

    const WRITE: u16 = 2;

    fn disk() -> Disk {
        Disk::new(100 * SECTOR + 7, false, "serial")
    }

    /// One request with its parts at 0x8000, 0x9000 and 0xa000.
    fn ask(disk: &Disk, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, Option<ImageWork>) {
        let memory = memory();
        let rings = rings(0, 8);
        let mut driver = Driver::new(memory.clone(), rings);
        let mut queue = Queue::new(memory.clone(), rings, RingFeatures::default()).unwrap();
        let header = u128::from(kind) | u128::from(sector) << 64;
        memory
            .write_slice(&header.to_le_bytes(), GuestAddress(0x8000))
            .unwrap();
        memory.write_slice(out, GuestAddress(0x8010)).unwrap();
        driver.descriptor(0, 0x8000, 16 + out.len() as u32, 1, 1);
        driver.descriptor(1, 0x9000, room + 1, WRITE, 0);
        driver.offer(0);
        let chain = queue.pop().unwrap().unwrap();
        let request = read_request(chain, &memory, disk, F_FLUSH).unwrap();
        assert_eq!(request.status, 0x9000 + u64::from(room));
        match request.work {
            Work::Done(status, written) => {
                if kind == TYPE_GET_ID {
                    let mut id = vec![0; written as usize];
                    memory.read_slice(&mut id, GuestAddress(0x9000)).unwrap();
                    assert_eq!(id, disk.serial);
                }
                (status, None)
            }
            Work::Image(work) => (STATUS_OK, Some(work)),
        }
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let value = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
        value.to_le_bytes().to_vec()
    }

    #[test]
    fn the_configuration_is_laid_out_as_the_specification_says() {
        let model = disk().model(3);
        assert_eq!(model.config.len(), 60);
        assert_eq!(model.config[0..8], 100u64.to_le_bytes());
        assert_eq!(model.config[12..16], 254u32.to_le_bytes());
        assert_eq!(model.config[20..24], 512u32.to_le_bytes());
        assert_eq!(model.config[34..36], 3u16.to_le_bytes());
        assert_eq!(model.config[56], 1);
        let read_only = Disk::new(512, true, "").model(1);
        assert_eq!(read_only.features & (F_RO | F_DISCARD), F_RO);
    }

    #[test]
    fn reads_and_writes_become_image_operations() {
        let work = ask(&disk(), TYPE_IN, 99, &[], 512).1.unwrap();
        assert_eq!((work.op, work.offset, work.len), (Op::Read, 99 * 512, 512));
        assert_eq!(work.buffers.iter().map(|b| b.iov_len).sum::<usize>(), 512);
        let work = ask(&disk(), TYPE_OUT, 2, &[7; 1024], 0).1.unwrap();
        assert_eq!((work.op, work.len), (Op::Write { fua: false }, 1024));
    }

    #[test]
    fn what_lies_beyond_the_disk_or_fills_no_sector_is_an_error() {
        for (sector, room) in [
            (100, 512),
            (99, 1024),
            (0, 511),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
        ] {
            let (status, work) = ask(&disk(), TYPE_IN, sector, &[], room);
            assert_eq!(
                (status, work.is_none()),
                (STATUS_IOERR, true),
                "{sector} {room}"
            );
        }
    }

    #[test]
    fn a_read_only_disk_refuses_changes() {
        let disk = Disk::new(1 << 20, true, "");
        assert_eq!(ask(&disk, TYPE_OUT, 0, &[0; 512], 0).0, STATUS_IOERR);
        assert_eq!(
            ask(&disk, TYPE_DISCARD, 0, &segment(0, 8, 0), 0).0,
            STATUS_IOERR
        );
        assert!(ask(&disk, TYPE_FLUSH, 0, &[], 0).1.is_some());
    }

    #[test]
    fn discard_and_write_zeroes_take_one_segment() {
        let work = ask(&disk(), TYPE_DISCARD, 0, &segment(8, 4, 0), 0)
            .1
            .unwrap();
        assert_eq!((work.op, work.offset, work.len), (Op::Discard, 4096, 2048));
        let work = ask(&disk(), TYPE_WRITE_ZEROES, 0, &segment(0, 4, 1), 0)
            .1
            .unwrap();
        assert_eq!(work.op, Op::WriteZeroes { unmap: true });
        for (kind, data, status) in [
            (TYPE_DISCARD, segment(0, 4, 1), STATUS_UNSUPPORTED),
            (TYPE_WRITE_ZEROES, segment(0, 4, 2), STATUS_UNSUPPORTED),
            (TYPE_DISCARD, segment(98, 4, 0), STATUS_IOERR),
            (TYPE_DISCARD, vec![0; 32], STATUS_IOERR),
            (TYPE_DISCARD, vec![0; 8], STATUS_IOERR),
        ] {
            assert_eq!(ask(&disk(), kind, 0, &data, 0).0, status);
        }
    }

    #[test]
    fn get_id_writes_the_serial_number() {
        assert_eq!(ask(&disk(), TYPE_GET_ID, 0, &[], 20).0, STATUS_OK);
        assert_eq!(ask(&disk(), 99, 0, &[], 20).0, STATUS_UNSUPPORTED);
    }

    #[test]
    fn a_driver_without_flush_gets_stable_writes() {
        let memory = memory();
        let rings = rings(0, 8);
        let mut driver = Driver::new(memory.clone(), rings);
        let mut queue = Queue::new(memory.clone(), rings, RingFeatures::default()).unwrap();
        memory.write_obj(1u32, GuestAddress(0x8000)).unwrap();
        driver.descriptor(0, 0x8000, 16 + 512, 1, 1);
        driver.descriptor(1, 0x9000, 1, WRITE, 0);
        driver.offer(0);
        let chain = queue.pop().unwrap().unwrap();
        let request = read_request(chain, &memory, &disk(), 0).unwrap();
        assert!(matches!(
            request.work,
            Work::Image(ImageWork {
                op: Op::Write { fua: true },
                ..
            })
        ));
    }

    #[test]
    fn a_request_without_header_or_status_is_a_fault() {
        for (out, room) in [(15, 1), (16, 0)] {
            let memory = memory();
            let rings = rings(0, 8);
            let mut driver = Driver::new(memory.clone(), rings);
            let mut queue = Queue::new(memory.clone(), rings, RingFeatures::default()).unwrap();
            driver.descriptor(0, 0x8000, out, 1, 1);
            driver.descriptor(1, 0x9000, room, WRITE, 0);
            driver.offer(0);
            let chain = queue.pop().unwrap().unwrap();
            assert!(matches!(
                read_request(chain, &memory, &disk(), 0),
                Err(Fault::Request)
            ));
        }
    }
}
