// SPDX-License-Identifier: Apache-2.0
//! The NBD protocol's numbers and messages (the NBD project's doc/proto.md): what comes from the
//! client is parsed here into typed values, once.

use crate::bytes::{be16, be32, be64};

pub(crate) const INIT_MAGIC: &[u8; 8] = b"NBDMAGIC";
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, and no padding behind an export's description.
pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const NO_ZEROES: u16 = 1 << 1;

/// What an export can do.
pub(crate) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Options of the handshake.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const UNSUPPORTED: u32 = (1 << 31) + 1;
    pub(crate) const INVALID: u32 = (1 << 31) + 3;
    pub(crate) const UNKNOWN: u32 = (1 << 31) + 6;
}

/// Kinds of information about an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Kinds of chunks of a structured reply, and their flag for the last.
pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1 << 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

/// Flags of a command.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const REQUEST_ONE: u16 = 1 << 3;
}

/// Flags of a range in base:allocation.
pub(crate) const STATE_HOLE: u32 = 1 << 0;
pub(crate) const STATE_ZERO: u32 = 1 << 1;
/// Flag of a range in qemu:dirty-bitmap (QEMU, docs/interop/nbd).
pub(crate) const STATE_DIRTY: u32 = 1 << 0;

/// Metadata contexts: that of the disk's allocation, and in front of a bitmap's name.
pub(crate) const ALLOCATION: &str = "base:allocation";
pub(crate) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// Errors as the protocol numbers them.
pub(crate) mod errno {
    pub(crate) const PERM: u32 = 1;
    pub(crate) const IO: u32 = 5;
    pub(crate) const INVAL: u32 = 22;
    pub(crate) const NOSPC: u32 = 28;
    pub(crate) const NOTSUP: u32 = 95;
}

/// An option of the handshake.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub(crate) option: u32,
    pub(crate) len: u32,
}

impl OptionHeader {
    pub(crate) const LEN: usize = 16;

    pub(crate) fn parse(bytes: &[u8]) -> Option<OptionHeader> {
        (be64(bytes, 0)? == OPTION_MAGIC).then_some(())?;
        Some(OptionHeader {
            option: be32(bytes, 8)?,
            len: be32(bytes, 12)?,
        })
    }
}

/// What a client wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
    /// One that this server does not know.
    Other(u16),
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: u16,
    pub(crate) command: Command,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl RequestHeader {
    pub(crate) const LEN: usize = 28;

    pub(crate) fn parse(bytes: &[u8]) -> Option<RequestHeader> {
        (be32(bytes, 0)? == REQUEST_MAGIC).then_some(())?;
        let command = match be16(bytes, 6)? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Other(other),
        };
        Some(RequestHeader {
            flags: be16(bytes, 4)?,
            command,
            cookie: be64(bytes, 8)?,
            offset: be64(bytes, 16)?,
            len: be32(bytes, 24)?,
        })
    }
}

/// The export's name at the front of an INFO or GO option, and the rest of the option.
pub(crate) fn parse_name(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = be32(data, 0)? as usize;
    let end = 4usize.checked_add(len)?;
    Some((data.get(4..end)?, data.get(end..)?))
}

/// The queries of a meta context option, behind the export's name.
pub(crate) fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (export, rest) = parse_name(data)?;
    let count = be32(rest, 0)?;
    let mut rest = rest.get(4..)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, behind) = parse_name(rest)?;
        queries.push(query);
        rest = behind;
    }
    rest.is_empty().then_some((export, queries))
}

/// A simple reply's header.
pub(crate) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut out = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out
}

/// The header of the last, or only, chunk of a structured reply.
pub(crate) fn last_chunk(kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    one_chunk(kind, cookie, len, true)
}

/// The header of a chunk of a structured reply.
pub(crate) fn one_chunk(kind: u16, cookie: u64, len: u32, last: bool) -> Vec<u8> {
    let mut out = CHUNK_MAGIC.to_be_bytes().to_vec();
    out.extend(if last { chunk::DONE } else { 0 }.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

/// A reply to an option.
pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_that_lie_about_their_length_are_refused() {
        let mut data = 1u32.to_be_bytes().to_vec();
        data.extend(b"x");
        data.extend(1u32.to_be_bytes());
        data.extend(15u32.to_be_bytes());
        data.extend(b"base:allocation");
        assert_eq!(
            parse_queries(&data),
            Some((&b"x"[..], vec![&b"base:allocation"[..]]))
        );
        for cut in 0..data.len() {
            assert_eq!(parse_queries(&data[..cut]), None, "{cut}");
        }
        data.push(0);
        assert_eq!(parse_queries(&data), None);
        assert_eq!(parse_queries(&[0xff; 12]), None);
    }

    #[test]
    fn a_request_needs_its_magic_and_its_length() {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 1, 0, 1]);
        bytes.extend(7u64.to_be_bytes());
        bytes.extend(512u64.to_be_bytes());
        bytes.extend(1024u32.to_be_bytes());
        let header = RequestHeader {
            flags: flag::FUA,
            command: Command::Write,
            cookie: 7,
            offset: 512,
            len: 1024,
        };
        assert_eq!(RequestHeader::parse(&bytes), Some(header));
        assert_eq!(RequestHeader::parse(&bytes[..27]), None);
        bytes[0] ^= 1;
        assert_eq!(RequestHeader::parse(&bytes), None);
    }
}
