// SPDX-License-Identifier: Apache-2.0
//! virtio-net (virtio 1.2, 5.1): what a network interface shows the guest, what its control commands mean and
//! which frames it takes.
//!
//! This file does no I/O. The feature list is the machine type's, whatever the host: checksums and TCP
//! segmentation both ways, mergeable buffers, several queues, and a control queue for what the interface takes.
//! A tap of any kernel that vmbus supports carries all of it out, served by [`crate::net`] with or without
//! vhost-net.
//!
//! | queue | what |
//! |---|---|
//! | 2 × n | pair n receives |
//! | 2 × n + 1 | pair n transmits |
//! | the last one | commands; number 2 for a driver that did not accept MQ |
//!
//! Until the driver says what it wants to receive, the interface is promiscuous.
//!
//! Left out: UFO and USO, the extended receive modes, VLAN filtering, gratuitous announcement, hashes and
//! steering, offloads that change while it runs, and speed and duplex.

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::queue::{self, Fault};
use super::{Model, F_RING};
use crate::memory::GuestMemoryMmap;
use crate::state::{self, State};

/// The device type.
pub const DEVICE_TYPE: u16 = 1;
/// Bytes of a hardware address.
pub const MAC: usize = 6;
/// Bytes of the header before each frame (5.1.6), whose last two say how many buffers it fills.
pub const HEADER: usize = 12;
/// Where in the header that number is.
pub const HEADER_BUFFERS: u64 = 10;
/// The most queue pairs of one interface: its queues have places in the common configuration.
pub const PAIRS_MAX: u16 = 8;
/// The largest packet that the guest is told to send, in bytes behind the Ethernet header.
pub const MTU: u16 = 1500;

/// The device computes checksums for the driver.
pub const F_CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is not yet computed.
pub const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
/// The driver takes TCP segments longer than a frame, over IPv4.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// The same over IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// The same with ECN.
pub const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
/// A received packet may fill several buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

const STATUS_LINK_UP: u16 = 1;

/// Where the configuration has the status.
pub const STATUS: usize = MAC;

/// The status of an interface whose cable is plugged in, or is not.
pub const fn status(carrier: bool) -> u16 {
    if carrier {
        STATUS_LINK_UP
    } else {
        0
    }
}

/// What the guest sees of an interface with `mac` and `pairs` queue pairs.
pub fn model(mac: [u8; MAC], pairs: u16, carrier: bool) -> Model {
    let mut config = mac.to_vec();
    for value in [status(carrier), pairs, MTU] {
        config.extend_from_slice(&value.to_le_bytes());
    }
    Model {
        device_type: DEVICE_TYPE,
        class: 0x020000,
        features: F_RING
            | F_CSUM
            | F_GUEST_CSUM
            | F_MTU
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_GUEST_ECN
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_HOST_ECN
            | F_MRG_RXBUF
            | F_STATUS
            | F_CTRL_VQ
            | F_CTRL_RX
            | F_MQ
            | F_CTRL_MAC_ADDR,
        queues: pairs.saturating_mul(2).saturating_add(1),
        queue_size: queue::SIZE_MAX,
        config,
        live: None,
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Receives, as part of this pair.
    Receive(u16),
    /// Transmits, as part of this pair.
    Transmit(u16),
    /// Takes commands.
    Control,
    /// None that the driver may give it.
    Unused,
}

/// What queue `index` of an interface with `pairs` pairs is for, once `features` were accepted.
pub fn purpose(index: u16, pairs: u16, features: u64) -> Purpose {
    let pairs = if features & F_MQ != 0 { pairs } else { 1 };
    let pair = index / 2;
    if pair >= pairs {
        let control = index == pairs.saturating_mul(2) && features & F_CTRL_VQ != 0;
        return if control {
            Purpose::Control
        } else {
            Purpose::Unused
        };
    }
    if index % 2 == 0 {
        Purpose::Receive(pair)
    } else {
        Purpose::Transmit(pair)
    }
}

/// The most addresses that a table holds; with more, all of that sort are taken (5.1.6.5.2).
const TABLE_MAX: usize = 64;
/// The longest command that is looked at: tables of some 1,300 addresses.
const COMMAND_MAX: u64 = 8192;

const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// Addresses of one sort.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    addresses: Vec<[u8; MAC]>,
    /// There were too many.
    all: bool,
}

impl Table {
    /// Takes a count and its addresses off the front of `data`; None when they are not there.
    fn take(data: &mut &[u8]) -> Option<Table> {
        let (count, rest) = data.split_first_chunk::<4>()?;
        let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?;
        let (addresses, rest) = rest.split_at_checked(bytes.checked_mul(MAC)?)?;
        *data = rest;
        let mut list = addresses.chunks_exact(MAC);
        Some(Table {
            all: list.len() > TABLE_MAX,
            addresses: list
                .by_ref()
                .take(TABLE_MAX)
                .filter_map(|address| address.try_into().ok())
                .collect(),
        })
    }

    fn has(&self, address: &[u8; MAC]) -> bool {
        self.all || self.addresses.contains(address)
    }
}

/// What of the settings is the driver's; the rest follows from the device and the features.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    pairs: u16,
    promiscuous: bool,
    all_multicast: bool,
    mac: [u8; MAC],
    unicast: Table,
    multicast: Table,
}

/// Which frames a driver takes, by the address that they are for.
pub struct Taken {
    /// Whatever the rest says.
    pub everything: bool,
    /// Those of one host; None for all of them.
    pub hosts: Option<Vec<[u8; MAC]>>,
    /// Those of groups, everybody's among them; None for all of them.
    pub groups: Option<Vec<[u8; MAC]>>,
}

/// What a driver has set by commands: which frames it wants, and on how many pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Queue pairs in use, from 1.
    pub pairs: u16,
    pairs_max: u16,
    features: u64,
    promiscuous: bool,
    all_multicast: bool,
    mac: [u8; MAC],
    unicast: Table,
    multicast: Table,
}

impl Settings {
    /// Those of a driver that has just accepted `features`.
    pub fn new(mac: [u8; MAC], pairs: u16, features: u64) -> Settings {
        Settings {
            pairs: 1,
            pairs_max: if features & F_MQ != 0 { pairs } else { 1 },
            features,
            promiscuous: true,
            all_multicast: false,
            mac,
            unicast: Table::default(),
            multicast: Table::default(),
        }
    }

    /// The address that the driver has now.
    pub fn mac(&self) -> [u8; MAC] {
        self.mac
    }

    /// What the driver has set, for a state.
    pub fn saved(&self) -> State {
        let saved = Saved {
            pairs: self.pairs,
            promiscuous: self.promiscuous,
            all_multicast: self.all_multicast,
            mac: self.mac,
            unicast: self.unicast.clone(),
            multicast: self.multicast.clone(),
        };
        state::write(&saved).unwrap_or_default()
    }

    /// Those of a driver that had set this before; None when none can have.
    pub fn restored(mac: [u8; MAC], pairs: u16, features: u64, state: &State) -> Option<Settings> {
        let saved: Saved = state::read(state).ok()?;
        let begin = Settings::new(mac, pairs, features);
        let fits = |table: &Table| table.addresses.len() <= TABLE_MAX;
        let possible = (1..=begin.pairs_max).contains(&saved.pairs)
            && fits(&saved.unicast)
            && fits(&saved.multicast);
        possible.then_some(Settings {
            pairs: saved.pairs,
            promiscuous: saved.promiscuous,
            all_multicast: saved.all_multicast,
            mac: saved.mac,
            unicast: saved.unicast,
            multicast: saved.multicast,
            ..begin
        })
    }

    /// Whether a frame to this address is for the driver.
    pub fn takes(&self, to: &[u8; MAC]) -> bool {
        let [first, ..] = to;
        self.promiscuous
            || if first & 1 == 0 {
                *to == self.mac || self.unicast.has(to)
            } else {
                *to == [0xff; MAC] || self.all_multicast || self.multicast.has(to)
            }
    }

    /// The same, spelt out.
    pub fn taken(&self) -> Taken {
        let sort = |table: &Table, own: [u8; MAC], group: bool| {
            let mut addresses = vec![own];
            addresses.extend(&table.addresses);
            addresses.retain(|[first, ..]| (first & 1 != 0) == group);
            (!table.all).then_some(addresses)
        };
        let groups = sort(&self.multicast, [0xff; MAC], true);
        Taken {
            everything: self.promiscuous,
            hosts: sort(&self.unicast, self.mac, false),
            groups: groups.filter(|_| !self.all_multicast),
        }
    }

    /// Carries a command out and writes its answer; returns how many bytes were written.
    ///
    /// # Errors
    /// A [`Fault`] when there is no room for the answer, or memory that is not RAM.
    pub fn command(&mut self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<u32, Fault> {
        let len = chain.readable.len();
        if chain.writable.is_empty() || len < 2 {
            return Err(Fault::Request);
        }
        let ack = if len > COMMAND_MAX {
            ACK_ERROR
        } else {
            let mut bytes = vec![0; len as usize];
            chain.readable.read_at(memory, 0, &mut bytes)?;
            match self.obey(&bytes) {
                Some(()) => ACK_OK,
                None => ACK_ERROR,
            }
        };
        chain.writable.write(memory, &[ack])
    }

    /// None for a command that does not exist, was not negotiated or does not have what belongs to it.
    pub(crate) fn obey(&mut self, command: &[u8]) -> Option<()> {
        let ([class, command], data) = command.split_first_chunk::<2>()?;
        match (class, command) {
            (0, 0 | 1) if self.features & F_CTRL_RX != 0 => {
                let on = match data {
                    [value] => *value != 0,
                    _ => return None,
                };
                if *command == 0 {
                    self.promiscuous = on;
                } else {
                    self.all_multicast = on;
                }
            }
            (1, 0) if self.features & F_CTRL_RX != 0 => {
                let mut rest = data;
                let unicast = Table::take(&mut rest)?;
                let multicast = Table::take(&mut rest)?;
                rest.is_empty().then_some(())?;
                self.unicast = unicast;
                self.multicast = multicast;
            }
            (1, 1) if self.features & F_CTRL_MAC_ADDR != 0 => self.mac = data.try_into().ok()?,
            (4, 0) if self.features & F_MQ != 0 => {
                let pairs = u16::from_le_bytes(data.try_into().ok()?);
                (1..=self.pairs_max).contains(&pairs).then_some(())?;
                self.pairs = pairs;
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::queue::testing::{memory, rings, Driver};
    use super::super::queue::{Queue, RingFeatures};
    use super::*;

    const OURS: [u8; MAC] = [0x52, 0, 0, 0, 0, 1];
    const OTHER: [u8; MAC] = [0x52, 0, 0, 0, 0, 2];
    const GROUP: [u8; MAC] = [0x33, 0x33, 0, 0, 0, 1];
    const ALL: u64 = u64::MAX;

    fn settings(features: u64) -> Settings {
        Settings::new(OURS, 4, features)
    }

    /// A command through a ring; its answer.
    fn command(settings: &mut Settings, bytes: &[u8]) -> Result<u8, Fault> {
        let memory = memory();
        let rings = rings(0, 8);
        let mut driver = Driver::new(memory.clone(), rings);
        let mut queue = Queue::new(memory.clone(), rings, RingFeatures::default()).unwrap();
        memory.write_slice(bytes, GuestAddress(0x8000)).unwrap();
        driver.descriptor(0, 0x8000, bytes.len() as u32, 1, 1);
        driver.descriptor(1, 0xf000, 1, 2, 0);
        driver.offer(0);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(settings.command(&chain, &memory)?, 1);
        Ok(memory.read_obj(GuestAddress(0xf000)).unwrap())
    }

    fn table(unicast: &[[u8; MAC]], multicast: &[[u8; MAC]]) -> Vec<u8> {
        let mut bytes = vec![1, 0];
        for list in [unicast, multicast] {
            bytes.extend_from_slice(&(list.len() as u32).to_le_bytes());
            bytes.extend(list.iter().flatten());
        }
        bytes
    }

    #[test]
    fn the_configuration_is_laid_out_as_the_specification_says() {
        let down = model(OURS, 2, false).config;
        assert_eq!(down[STATUS..STATUS + 2], [0, 0]);
        let model = model(OURS, 2, true);
        assert_eq!(model.config, [0x52, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0xdc, 0x05]);
        assert_eq!(model.queues, 5);
        // Part of the machine type: a change here is another machine type.
        assert_eq!(model.features, 0x1_30c7_bbab);
    }

    #[test]
    fn the_control_queue_is_where_the_driver_expects_it() {
        assert_eq!(purpose(0, 4, ALL), Purpose::Receive(0));
        assert_eq!(purpose(7, 4, ALL), Purpose::Transmit(3));
        assert_eq!(purpose(8, 4, ALL), Purpose::Control);
        assert_eq!(purpose(2, 4, ALL & !F_MQ), Purpose::Control);
        assert_eq!(purpose(3, 4, ALL & !F_MQ), Purpose::Unused);
        assert_eq!(purpose(2, 4, 0), Purpose::Unused);
    }

    #[test]
    fn everything_is_taken_until_the_driver_says_otherwise() {
        let mut settings = settings(ALL);
        assert!(settings.takes(&OTHER) && settings.takes(&GROUP));
        assert_eq!(command(&mut settings, &[0, 0, 0]).unwrap(), ACK_OK);
        assert!(settings.takes(&OURS) && settings.takes(&[0xff; MAC]));
        assert!(!settings.takes(&OTHER) && !settings.takes(&GROUP));
        assert_eq!(command(&mut settings, &[0, 1, 1]).unwrap(), ACK_OK);
        assert!(!settings.takes(&OTHER) && settings.takes(&GROUP));
    }

    #[test]
    fn the_tables_say_what_else_is_taken() {
        let mut settings = settings(ALL);
        command(&mut settings, &[0, 0, 0]).unwrap();
        let both = table(&[OTHER], &[GROUP]);
        assert_eq!(command(&mut settings, &both).unwrap(), ACK_OK);
        assert!(settings.takes(&OTHER) && settings.takes(&GROUP));
        assert!(!settings.takes(&[0x52, 0, 0, 0, 0, 3]));
        let many = table(&[], &[[1, 2, 3, 4, 5, 6]; TABLE_MAX + 1]);
        assert_eq!(command(&mut settings, &many).unwrap(), ACK_OK);
        assert!(!settings.takes(&OTHER) && settings.takes(&GROUP));
    }

    #[test]
    fn a_new_address_replaces_the_old_one() {
        let mut settings = settings(ALL);
        command(&mut settings, &[0, 0, 0]).unwrap();
        let mut bytes = vec![1, 1];
        bytes.extend(OTHER);
        assert_eq!(command(&mut settings, &bytes).unwrap(), ACK_OK);
        assert!(settings.takes(&OTHER) && !settings.takes(&OURS));
    }

    #[test]
    fn pairs_are_at_least_one_and_no_more_than_there_are() {
        let mut settings = settings(ALL);
        for (pairs, ack) in [(0, ACK_ERROR), (4, ACK_OK), (5, ACK_ERROR)] {
            assert_eq!(command(&mut settings, &[4, 0, pairs, 0]).unwrap(), ack);
        }
        assert_eq!(settings.pairs, 4);
    }

    #[test]
    fn what_is_unknown_cut_short_or_not_negotiated_changes_nothing() {
        let mut cut = table(&[OTHER], &[GROUP]);
        cut.pop();
        let mut huge = vec![1, 0];
        huge.extend([0xff; 8]);
        let long = vec![0; 8193];
        for bytes in [
            vec![0, 2, 1],
            vec![9, 0, 0],
            vec![0, 0],
            vec![0, 0, 0, 0],
            vec![1, 1, 2],
            vec![4, 0, 1],
            cut,
            huge,
            long,
        ] {
            let mut settings = settings(ALL);
            let before = settings.clone();
            assert_eq!(command(&mut settings, &bytes).unwrap(), ACK_ERROR);
            assert_eq!(settings, before);
        }
        for bytes in [vec![0, 0, 0], vec![4, 0, 1, 0], table(&[], &[])] {
            assert_eq!(
                command(&mut settings(F_CTRL_VQ), &bytes).unwrap(),
                ACK_ERROR
            );
        }
    }

    #[test]
    fn a_command_without_its_two_bytes_is_a_fault() {
        assert!(command(&mut settings(ALL), &[0]).is_err());
    }

    #[test]
    fn settings_go_on_unless_no_driver_can_have_made_them() {
        let mac = [2, 0, 0, 0, 0, 1];
        let mut settings = Settings::new(mac, 4, u64::MAX);
        settings.obey(&[4, 0, 3, 0]).unwrap();
        settings.obey(&[0, 0, 0]).unwrap();
        let state = settings.saved();
        let again = Settings::restored(mac, 4, u64::MAX, &state);
        assert_eq!(again, Some(settings));
        assert_eq!(Settings::restored(mac, 2, u64::MAX, &state), None);
    }
}
