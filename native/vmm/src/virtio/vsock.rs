// SPDX-License-Identifier: Apache-2.0
//! virtio-vsock (virtio 1.2, 5.10): what a guest sees, and the packets on its queues. [`crate::vsock`] serves them.
//!
//! | queue | what |
//! |---|---|
//! | 0 | room for packets to the guest |
//! | 1 | packets from it |
//! | 2 | room for events: all connections are gone, since the machine went on elsewhere |
//!
//! There are stream sockets between the guest and the host, CID 2, and nobody else. The guest's own CID is a number in its
//! definition; no other machine can reach it, so two may have the same.
//!
//! Left out: sequential packets (5.10.6.7), which few use, and datagrams, which no version of virtio has.

use super::{Model, F_RING};
use crate::virtio::queue;

/// The host's CID.
pub const HOST: u64 = 2;
/// The least CID of a guest; those below are reserved (5.10.4).
pub const CID_LEAST: u32 = 3;
/// The greatest; the one above means any.
pub const CID_MOST: u32 = u32::MAX - 1;
/// VIRTIO_VSOCK_F_STREAM.
pub const F_STREAM: u64 = 1;

/// Room for packets to the guest.
pub const TO_GUEST: u16 = 0;
/// Packets from the guest.
pub const FROM_GUEST: u16 = 1;
/// Room for events.
pub const EVENTS: u16 = 2;

/// Bytes of a packet's header (5.10.6).
pub const HEADER: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as the driver reads it.
pub const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// The sender of a shutdown receives no more.
pub const NO_RECEIVE: u32 = 1;
/// It sends no more.
pub const NO_SEND: u32 = 2;
/// Both.
pub const CLOSED: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for (5.10.6, `enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Somebody wants to connect.
    Request = 1,
    /// Yes.
    Response = 2,
    /// No, or no longer.
    Reset = 3,
    /// The sender will not send, or not receive, any more.
    Shutdown = 4,
    /// Bytes.
    Data = 5,
    /// How much room there is.
    CreditUpdate = 6,
    /// How much room is there?
    CreditRequest = 7,
}

impl Operation {
    /// None for what is none.
    pub fn of(number: u16) -> Option<Operation> {
        use Operation::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [
            Request,
            Response,
            Reset,
            Shutdown,
            Data,
            CreditUpdate,
            CreditRequest,
        ];
        all.into_iter()
            .find(|operation| *operation as u16 == number)
    }
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Who sends it.
    pub src_cid: u64,
    /// Who is to get it.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The other's.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// An [`Operation`].
    pub operation: u16,
    /// Of a shutdown.
    pub flags: u32,
    /// How many bytes the sender has room for in all.
    pub room: u32,
    /// How many it has taken out of there, counted modulo 2^32.
    pub taken: u32,
}

impl Packet {
    /// From the bytes on the ring.
    pub fn parse(bytes: &[u8; HEADER]) -> Packet {
        let mut rest: &[u8] = bytes;
        let src_cid = u64::from_le_bytes(front(&mut rest));
        let dst_cid = u64::from_le_bytes(front(&mut rest));
        let src_port = u32::from_le_bytes(front(&mut rest));
        let dst_port = u32::from_le_bytes(front(&mut rest));
        let len = u32::from_le_bytes(front(&mut rest));
        let kind = u16::from_le_bytes(front(&mut rest));
        let operation = u16::from_le_bytes(front(&mut rest));
        let flags = u32::from_le_bytes(front(&mut rest));
        let room = u32::from_le_bytes(front(&mut rest));
        let taken = u32::from_le_bytes(front(&mut rest));
        Packet {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            kind,
            operation,
            flags,
            room,
            taken,
        }
    }

    /// The bytes on the ring.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.operation.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.room.to_le_bytes());
        bytes.extend(self.taken.to_le_bytes());
        bytes
    }

    /// The reset that answers it.
    pub fn refusal(&self) -> Packet {
        Packet {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            operation: Operation::Reset as u16,
            ..Packet::default()
        }
    }
}

fn front<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, after)) = rest.split_first_chunk::<N>() else {
        return [0; N];
    };
    *rest = after;
    *first
}

/// What the guest with this CID sees.
pub fn model(cid: u32) -> Model {
    Model {
        device_type: 19,
        class: 0x078000,
        features: F_RING | F_STREAM,
        queues: 3,
        queue_size: queue::SIZE_MAX,
        config: u64::from(cid).to_le_bytes().to_vec(),
        live: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_what_it_was_when_it_was_written() {
        let bytes: [u8; HEADER] = std::array::from_fn(|place| place as u8);
        let packet = Packet::parse(&bytes);
        assert_eq!(packet.bytes(), bytes);
        assert_eq!(packet.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((packet.dst_port, packet.kind), (0x1716_1514, 0x1d1c));
        assert_eq!(packet.taken, 0x2b2a_2928);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        assert_eq!(Operation::of(5), Some(Operation::Data));
        assert_eq!(Operation::of(0), None);
        assert_eq!(Operation::of(8), None);
    }

    #[test]
    fn the_guest_sees_its_cid() {
        let model = model(77);
        assert_eq!(model.config, [77, 0, 0, 0, 0, 0, 0, 0]);
        // Part of the machine type: a change here is another machine type.
        assert_eq!((model.features, model.queues), (0x1_3000_0001, 3));
    }
}
