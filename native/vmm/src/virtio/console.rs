// SPDX-License-Identifier: Apache-2.0
//! virtio-console with named ports (virtio 1.2, 5.3): what a guest sees, and the conversation on the control queues.
//! [`crate::ports`] moves the bytes.
//!
//! | queue | what |
//! |---|---|
//! | 0, 1 | to and from the guest, port 0 |
//! | 2, 3 | control: to the guest, from it |
//! | 2 n + 2, 2 n + 3 | port n, from 1 |
//!
//! A port is a stream of bytes with a name; none is a console. The host's end is always open: what nobody there reads
//! is kept by whoever holds it. Each message of the driver's is answered with at most two for each port,
//! and no further one is looked at while many wait, so a driver cannot make us hold more.
//!
//! Left out: consoles (the serial line is one), sizes, emergency writes, ports that come and go.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::queue::{self, Fault};
use super::{Model, F_RING};
use crate::memory::GuestMemoryMmap;
use crate::state::Bytes;

/// The most ports.
pub const PORTS_MAX: usize = 15;
/// Messages to the guest.
pub const TO_GUEST: u16 = 2;
/// Messages from the guest.
pub const FROM_GUEST: u16 = 3;
/// Several ports, and the control queues.
pub const F_MULTIPORT: u64 = 1 << 1;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Messages that may wait for the driver before none of its own are looked at.
const WAITING_MAX: usize = 64;

/// What the guest sees of so many ports.
pub fn model(ports: usize) -> Model {
    let ports = ports.clamp(1, PORTS_MAX) as u16;
    // Columns and rows of no console; ports; the emergency write.
    let mut config = vec![0; 4];
    config.extend(u32::from(ports).to_le_bytes());
    config.extend([0; 4]);
    Model {
        device_type: 3,
        class: 0x078000,
        features: F_RING | F_MULTIPORT,
        queues: ports.saturating_mul(2).saturating_add(2),
        queue_size: queue::SIZE_MAX,
        config,
        live: None,
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Room for what goes to the guest, of this port.
    Receive(usize),
    /// What comes from it.
    Transmit(usize),
    /// Room for messages to it.
    ToGuest,
    /// Messages from it.
    FromGuest,
    /// None that the driver may give it.
    Unused,
}

/// What queue `index` is for, once `features` were accepted.
pub fn purpose(index: u16, features: u64) -> Purpose {
    let port = match (index, features & F_MULTIPORT != 0) {
        (0 | 1, _) => 0,
        (_, false) => return Purpose::Unused,
        (TO_GUEST, _) => return Purpose::ToGuest,
        (FROM_GUEST, _) => return Purpose::FromGuest,
        (index, _) => usize::from(index / 2).saturating_sub(1),
    };
    if index % 2 == 0 {
        Purpose::Receive(port)
    } else {
        Purpose::Transmit(port)
    }
}

/// The conversation with one driver.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    /// Which ports the guest has open.
    open: Vec<bool>,
    /// What is still to be said.
    waiting: VecDeque<Bytes>,
}

impl Conversation {
    /// With a driver that has just become ready. One without several ports has port 0 open, and says nothing.
    pub fn new(ports: usize, features: u64) -> Conversation {
        let alone = features & F_MULTIPORT == 0;
        Conversation {
            open: (0..ports).map(|port| alone && port == 0).collect(),
            waiting: VecDeque::new(),
        }
    }

    /// Whether it is one about so many ports, as far as a driver could have brought it.
    pub fn fits(&self, ports: usize) -> bool {
        self.open.len() == ports && self.waiting.len() <= WAITING_MAX + 2 * PORTS_MAX
    }

    /// Whether the guest has the port open: what goes to it is read by somebody.
    pub fn is_open(&self, port: usize) -> bool {
        self.open.get(port).is_some_and(|open| *open)
    }

    /// The same of each port.
    pub fn open(&self) -> &[bool] {
        &self.open
    }

    /// Whether a further message of the driver's may be looked at.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX
    }

    /// A message of the driver's; what makes no sense changes nothing.
    ///
    /// # Errors
    /// A [`Fault`] when it is none, or no RAM.
    pub fn heard(
        &mut self,
        chain: &mut Chain,
        memory: &GuestMemoryMmap,
        names: &[String],
    ) -> Result<(), Fault> {
        let message = chain.readable.take_front::<8>(memory)?;
        let [a, b, c, d, e, f, g, h] = message.ok_or(Fault::Request)?;
        let port = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match event {
            DEVICE_READY if value == 1 => {
                for (number, _) in (0u32..).zip(names) {
                    self.say(number, PORT_ADD, 1, &[]);
                }
            }
            PORT_READY if value == 1 => {
                if let Some(name) = names.get(port as usize) {
                    let mut text = name.as_bytes().to_vec();
                    text.push(0);
                    self.say(port, PORT_NAME, 1, &text);
                    self.say(port, PORT_OPEN, 1, &[]);
                }
            }
            PORT_OPEN => {
                if let Some(open) = self.open.get_mut(port as usize) {
                    *open = value != 0;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The next message for the driver into a chain of the queue for them; None when there is nothing to say.
    ///
    /// # Errors
    /// A [`Fault`] when it does not fit.
    pub fn next(&mut self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<Option<u32>, Fault> {
        let Some(Bytes(message)) = self.waiting.front() else {
            return Ok(None);
        };
        let written = chain.writable.write(memory, message)?;
        if written as usize != message.len() {
            return Err(Fault::Request);
        }
        self.waiting.pop_front();
        Ok(Some(written))
    }

    /// Whether there is something to say.
    pub fn is_silent(&self) -> bool {
        self.waiting.is_empty()
    }

    fn say(&mut self, port: u32, event: u16, value: u16, text: &[u8]) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(text);
        self.waiting.push_back(Bytes(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_ports_lie_around_those_for_control() {
        let all = u64::MAX;
        assert_eq!(purpose(0, all), Purpose::Receive(0));
        assert_eq!(purpose(1, all), Purpose::Transmit(0));
        assert_eq!(purpose(2, all), Purpose::ToGuest);
        assert_eq!(purpose(3, all), Purpose::FromGuest);
        assert_eq!(purpose(4, all), Purpose::Receive(1));
        assert_eq!(purpose(7, all), Purpose::Transmit(2));
        assert_eq!(purpose(1, 0), Purpose::Transmit(0));
        assert_eq!(purpose(2, 0), Purpose::Unused);
    }

    #[test]
    fn the_configuration_is_laid_out_as_the_specification_says() {
        let model = model(3);
        assert_eq!(model.config, [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(model.queues, 8);
        // Part of the machine type: a change here is another machine type.
        assert_eq!(model.features, 0x1_3000_0002);
    }
}
