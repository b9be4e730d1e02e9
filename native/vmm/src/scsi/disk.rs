// SPDX-License-Identifier: Apache-2.0
//! What only disks are asked (SBC-3): write-back with a flush, and space that is given back, in ranges as those of
//! virtio-blk.

use vmbus_qcow2::Op;

use super::cdb::Cdb;
use super::sense::Sense;
use super::{Outcome, Unit, TRANSFER_MAX};

/// Bytes of a block.
pub const BLOCK: u64 = 512;
/// Blocks in one range that is unmapped or zeroed: 2 GiB.
pub const RANGE_MAX: u64 = 1 << 22;
/// The most bytes of parameters that a command is given: a block of a WRITE SAME.
pub const PARAMETERS: usize = BLOCK as usize;

const WRITE_6: u8 = 0x0a;
const WRITE_10: u8 = 0x2a;
const VERIFY_10: u8 = 0x2f;
const SYNCHRONIZE_10: u8 = 0x35;
const WRITE_SAME_10: u8 = 0x41;
const UNMAP: u8 = 0x42;
const WRITE_16: u8 = 0x8a;
const VERIFY_16: u8 = 0x8f;
const SYNCHRONIZE_16: u8 = 0x91;
const WRITE_SAME_16: u8 = 0x93;
const SERVICE_IN_16: u8 = 0x9e;
const WRITE_12: u8 = 0xaa;

/// Whether what the guest sends with this command is not blocks to be written.
pub fn has_parameters(opcode: u8) -> bool {
    matches!(opcode, UNMAP | WRITE_SAME_10 | WRITE_SAME_16)
}

impl Unit {
    pub(super) fn disk_command(&self, cdb: &Cdb, parameters: &[u8]) -> Result<Outcome, Sense> {
        match cdb.opcode() {
            WRITE_6 | WRITE_10 | WRITE_12 | WRITE_16 => {
                let fua = cdb.force_unit_access();
                self.blocks_work(cdb, Op::Write { fua })
            }
            SYNCHRONIZE_10 | SYNCHRONIZE_16 => Ok(Outcome::Image(super::Work {
                op: Op::Flush,
                offset: 0,
                len: 0,
            })),
            // Whether the blocks can be read is not tried: no medium of ours wears out.
            VERIFY_10 | VERIFY_16 if cdb.byte(1) & 6 == 0 => {
                let (first, count) = cdb.range();
                let end = first.checked_add(count).ok_or(Sense::OUT_OF_RANGE)?;
                if end > self.ready()? {
                    return Err(Sense::OUT_OF_RANGE);
                }
                Ok(Outcome::Good(Vec::new()))
            }
            WRITE_SAME_10 | WRITE_SAME_16 => self.write_same(cdb, parameters),
            UNMAP => self.unmap(parameters),
            SERVICE_IN_16 if cdb.byte(1) & 0x1f == 0x10 => self.capacity_16(cdb),
            _ => Err(Sense::UNKNOWN_COMMAND),
        }
    }

    /// Zeros only, which need not be sent by one who says so (NDOB).
    fn write_same(&self, cdb: &Cdb, parameters: &[u8]) -> Result<Outcome, Sense> {
        let no_data = cdb.opcode() == WRITE_SAME_16 && cdb.byte(1) & 1 != 0;
        if !no_data {
            let block = parameters
                .get(..PARAMETERS)
                .ok_or(Sense::SHORT_PARAMETERS)?;
            if block.iter().any(|byte| *byte != 0) {
                return Err(Sense::BAD_PARAMETER);
            }
        }
        // 0 blocks would be all to the end (SBC-3, 5.44), which is more than one range may have.
        if cdb.range().1 == 0 {
            return Err(Sense::BAD_FIELD);
        }
        let unmap = cdb.byte(1) & 8 != 0;
        self.blocks_work(cdb, Op::WriteZeroes { unmap })
    }

    /// One descriptor, as the limits say; or none.
    fn unmap(&self, parameters: &[u8]) -> Result<Outcome, Sense> {
        if self.is_read_only() {
            return Err(Sense::PROTECTED);
        }
        let header = parameters
            .first_chunk::<8>()
            .ok_or(Sense::SHORT_PARAMETERS)?;
        let [_, _, high, low, ..] = *header;
        let bytes = u16::from_be_bytes([high, low]);
        if bytes == 0 {
            return Ok(Outcome::Good(Vec::new()));
        }
        let descriptor = parameters.get(8..24).ok_or(Sense::SHORT_PARAMETERS)?;
        if bytes != 16 {
            return Err(Sense::BAD_PARAMETER);
        }
        // The same places as in a command of 16 bytes, two further on.
        let mut command = [0; super::cdb::LEN];
        command[0] = WRITE_SAME_16;
        for (byte, value) in command.iter_mut().skip(2).zip(descriptor.iter().take(12)) {
            *byte = *value;
        }
        self.blocks_work(&Cdb(command), Op::Discard)
    }

    fn capacity_16(&self, cdb: &Cdb) -> Result<Outcome, Sense> {
        let mut bytes = self.ready()?.saturating_sub(1).to_be_bytes().to_vec();
        bytes.extend((BLOCK as u32).to_be_bytes());
        // No protection; physical blocks of 8; space is given back where it can be.
        let thin = if self.is_read_only() { 0 } else { 0x80 };
        bytes.extend([0, 3, thin, 0]);
        bytes.resize(32, 0);
        Ok(super::cut(bytes, cdb.be32(10)))
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }
}

/// Block limits (SBC-3, 6.6.4).
pub(super) fn limits() -> Vec<u8> {
    let mut body = vec![0; 60];
    let mut put = |offset: usize, value: &[u8]| {
        for (byte, value) in body.iter_mut().skip(offset).zip(value) {
            *byte = *value;
        }
    };
    put(4, &(TRANSFER_MAX as u32).to_be_bytes());
    put(16, &(RANGE_MAX as u32).to_be_bytes());
    // One descriptor an UNMAP, best by clusters of 64 KiB.
    put(20, &1u32.to_be_bytes());
    put(24, &128u32.to_be_bytes());
    put(32, &RANGE_MAX.to_be_bytes());
    body
}

/// Block device characteristics: nothing rotates (SBC-3, 6.6.3).
pub(super) fn characteristics() -> Vec<u8> {
    let mut body = vec![0, 1];
    body.resize(60, 0);
    body
}

/// Logical block provisioning (SBC-3, 6.6.6).
pub(super) fn provisioning(read_only: bool) -> Vec<u8> {
    if read_only {
        return vec![0; 4];
    }
    // UNMAP, WRITE SAME (16) and (10) give space back; thin.
    vec![0, 0xe0, 2, 0]
}

/// Caching with a write-back cache, and control.
pub(super) fn mode_pages() -> [Vec<u8>; 2] {
    let mut caching = vec![0; 20];
    caching.splice(..3, [0x08, 18, 4]);
    let mut control = vec![0; 12];
    control.splice(..2, [0x0a, 10]);
    [caching, control]
}
