// SPDX-License-Identifier: Apache-2.0
//! virtio-scsi (virtio 1.2, 5.6): a host adapter, what it shows the guest, and how commands and their answers lie in
//! chains. What a command means is [`crate::scsi`]'s business.
//!
//! Queue 0 takes task management, queue 1 has room for events, the others take commands. Sizes of commands
//! and sense data are the defaults and stay so. There is one channel; each target has one unit, number 0.
//!
//! Left out: protection information, transfers both ways in one command. No target comes or goes, but hot plugging
//! is offered: Linux gives room for events only where it is.

use super::chain::{Chain, Segments};
use super::queue::{self, Fault};
use super::{Model, F_RING};
use crate::memory::GuestMemoryMmap;
use crate::scsi::cdb::{self, Cdb};
use crate::scsi::sense::{self, Sense};
use crate::scsi::TRANSFER_MAX;

/// The most targets.
pub const TARGETS_MAX: usize = 64;
/// The most queues for commands.
pub const QUEUES_MAX: u16 = 16;
/// Task management.
pub const CONTROL: u16 = 0;
/// Events.
pub const EVENTS: u16 = 1;

const F_HOTPLUG: u64 = 1 << 1;
const F_CHANGE: u64 = 1 << 2;
const SENSE: usize = 96;
/// Bytes of a command's header and of its answer's.
const REQUEST: usize = 19 + cdb::LEN;
const RESPONSE: usize = 12 + SENSE;
const EVENT: usize = 16;

/// What the guest sees, with so many queues for commands.
pub fn model(queues: u16) -> Model {
    let mut config = Vec::with_capacity(36);
    for value in [
        u32::from(queues),
        u32::from(queue::SIZE_MAX) - 2,
        TRANSFER_MAX as u32,
        128,
        EVENT as u32,
        SENSE as u32,
        cdb::LEN as u32,
    ] {
        config.extend(value.to_le_bytes());
    }
    // Channels, targets and units are numbered from 0 to these.
    config.extend(0u16.to_le_bytes());
    config.extend((TARGETS_MAX as u16 - 1).to_le_bytes());
    config.extend(0u32.to_le_bytes());
    Model {
        device_type: 8,
        class: 0x010000,
        features: F_RING | F_HOTPLUG | F_CHANGE,
        queues: queues.saturating_add(2),
        queue_size: queue::SIZE_MAX,
        config,
        live: None,
    }
}

/// VIRTIO_SCSI_S_*: what became of a request before the unit had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// The unit has answered, or the function is complete.
    Ok = 0,
    /// There is less room for data than the command moves.
    Overrun = 1,
    /// No such target.
    BadTarget = 3,
    /// It breaks the rules of the transport.
    Failure = 9,
    /// No such unit.
    IncorrectLun = 12,
}

/// A target and a unit, as the eight bytes of a request name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address([u8; 8]);

impl Address {
    /// Unit 0 of a target, as REPORT LUNS has it: Linux looks for the unit of an event by these bytes.
    pub fn of(target: u8) -> Address {
        Address([1, target, 0, 0, 0, 0, 0, 0])
    }

    /// The target; None when the first byte says that it is something else.
    pub fn target(self) -> Option<usize> {
        let [kind, target, ..] = self.0;
        (kind == 1).then_some(usize::from(target))
    }

    /// The unit.
    pub fn unit(self) -> u16 {
        let [_, _, high, low, ..] = self.0;
        u16::from_be_bytes([high & 0x3f, low])
    }
}

/// A command on its way to a unit.
pub struct Command {
    /// Which.
    pub address: Address,
    /// The command itself.
    pub cdb: Cdb,
    /// Data from the guest.
    pub data_out: Segments,
    /// Room for data for it.
    pub data_in: Segments,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Where the answer to a command goes.
#[derive(Debug)]
pub struct Reply {
    header: Segments,
    /// Bytes of data that the guest has or has room for.
    room: u64,
}

/// A chain from a queue for commands.
///
/// # Errors
/// A [`Fault`] when it has no header, or no room for an answer.
pub fn command(mut chain: Chain, memory: &GuestMemoryMmap) -> Result<Command, Fault> {
    let header = chain.readable.take_front::<REQUEST>(memory)?;
    let answer = chain.writable.split_front(RESPONSE as u64);
    let (Some(request), Some(header)) = (header, answer) else {
        return Err(Fault::Request);
    };
    let (address, rest) = request.split_first_chunk::<8>().ok_or(Fault::Request)?;
    // Between them lie tag, attribute, priority and a number that nobody uses.
    let cdb = rest.last_chunk::<{ cdb::LEN }>().ok_or(Fault::Request)?;
    let room = chain.readable.len().max(chain.writable.len());
    Ok(Command {
        address: Address(*address),
        cdb: Cdb(*cdb),
        data_out: chain.readable,
        data_in: chain.writable,
        reply: Reply { header, room },
    })
}

impl Reply {
    /// The unit has carried the command out, and moved so many bytes; how many were written in all comes back, of
    /// which `to_guest` are data.
    ///
    /// # Errors
    /// `Fault::Memory` when the place is no RAM.
    pub fn good(&self, memory: &GuestMemoryMmap, moved: u64, to_guest: u32) -> Result<u32, Fault> {
        let left = self.room.saturating_sub(moved);
        self.write(memory, left, 0, Response::Ok, &[])?;
        Ok(to_guest.saturating_add(RESPONSE as u32))
    }

    /// The unit has not, for this reason.
    ///
    /// # Errors
    /// As [`Reply::good`].
    pub fn check(&self, memory: &GuestMemoryMmap, sense: Sense) -> Result<u32, Fault> {
        const CHECK_CONDITION: u8 = 2;
        let bytes = sense.bytes();
        self.write(memory, self.room, CHECK_CONDITION, Response::Ok, &bytes)
    }

    /// No unit had it.
    ///
    /// # Errors
    /// As [`Reply::good`].
    pub fn refuse(&self, memory: &GuestMemoryMmap, response: Response) -> Result<u32, Fault> {
        self.write(memory, self.room, 0, response, &[])
    }

    fn write(
        &self,
        memory: &GuestMemoryMmap,
        left: u64,
        status: u8,
        response: Response,
        sense: &[u8],
    ) -> Result<u32, Fault> {
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(RESPONSE);
        bytes.extend((sense.len() as u32).to_le_bytes());
        bytes.extend(left.to_le_bytes());
        bytes.extend([0, 0, status, response as u8]);
        bytes.extend(sense);
        bytes.resize(RESPONSE, 0);
        self.header.write(memory, &bytes)
    }
}

/// What the control queue is asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Management {
    /// Let go of tasks of a unit: its state goes back to that after power-on, too, if `reset`.
    Tasks {
        /// The unit's address.
        address: Address,
        /// More than its tasks is meant.
        reset: bool,
    },
    /// Which events come without being asked for: none.
    Asynchronous,
    /// Something else.
    Unknown,
}

/// A chain from the control queue, and where its answer goes.
///
/// # Errors
/// A [`Fault`] when it has no type, or no room for an answer.
pub fn management(
    mut chain: Chain,
    memory: &GuestMemoryMmap,
) -> Result<(Management, Segments), Fault> {
    let kind = chain.readable.take_front::<4>(memory)?;
    let kind = u32::from_le_bytes(kind.ok_or(Fault::Request)?);
    if chain.writable.is_empty() {
        return Err(Fault::Request);
    }
    let asked = match kind {
        0 => {
            let sub = chain.readable.take_front::<4>(memory)?;
            let sub = u32::from_le_bytes(sub.ok_or(Fault::Request)?);
            let address = chain.readable.take_front::<8>(memory)?;
            let address = Address(address.ok_or(Fault::Request)?);
            match sub {
                // Abort task and task set, clear task set; resets of nexus and unit; queries find nothing.
                0 | 1 | 3 | 6 | 7 => Management::Tasks {
                    address,
                    reset: false,
                },
                4 | 5 => Management::Tasks {
                    address,
                    reset: true,
                },
                _ => Management::Unknown,
            }
        }
        1 | 2 => Management::Asynchronous,
        _ => Management::Unknown,
    };
    Ok((asked, chain.writable))
}

/// Writes the answer to something from the control queue; how many bytes there are of it.
///
/// # Errors
/// `Fault::Memory` when the place is no RAM.
pub fn answer_management(
    place: &Segments,
    memory: &GuestMemoryMmap,
    asked: &Management,
    response: Response,
) -> Result<u32, Fault> {
    match asked {
        // The events that are subscribed, and the response.
        Management::Asynchronous => place.write(memory, &[0, 0, 0, 0, response as u8]),
        _ => place.write(memory, &[response as u8]),
    }
}

/// An event for a unit: its parameters have changed, for this reason. `missed`: others before it found no room.
///
/// # Errors
/// `Fault::Request` when there is no room for one, `Fault::Memory` when that is no RAM.
pub fn write_event(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    about: Option<(Address, Sense)>,
    missed: bool,
) -> Result<u32, Fault> {
    const PARAMETERS: u32 = 3;
    const MISSED: u32 = 1 << 31;
    if chain.writable.len() < EVENT as u64 {
        return Err(Fault::Request);
    }
    let kind = if about.is_some() { PARAMETERS } else { 0 } | if missed { MISSED } else { 0 };
    let mut bytes = kind.to_le_bytes().to_vec();
    let (address, reason) = match about {
        Some((address, sense)) => (address.0, sense.reason()),
        None => ([0; 8], 0),
    };
    bytes.extend(address);
    bytes.extend(reason.to_le_bytes());
    chain.writable.write(memory, &bytes)
}

const _: () = assert!(sense::LEN <= SENSE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_laid_out_as_the_specification_says() {
        let model = model(3);
        let words: Vec<u32> = model
            .config
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words[0], 3);
        assert_eq!(words[2..7], [0xffff, 128, 16, 96, 32]);
        assert_eq!((words[7], words[8]), (63 << 16, 0));
        assert_eq!((model.queues, model.config.len()), (5, 36));
        // Part of the machine type: a change here is another machine type.
        assert_eq!(model.features, 0x1_3000_0006);
    }

    #[test]
    fn an_address_names_a_target_and_its_unit() {
        assert_eq!(Address::of(7).target(), Some(7));
        assert_eq!(Address::of(7).unit(), 0);
        assert_eq!(Address([1, 2, 0x41, 3, 0, 0, 0, 0]).unit(), 0x103);
        assert_eq!(Address([0xc1, 1, 0, 0, 0, 0, 0, 0]).target(), None);
    }
}
