// SPDX-License-Identifier: Apache-2.0
//! A machine that goes on elsewhere tells the network where it is now.
//!
//! Switches and bridges send a machine's frames where they have last heard it, and a guest that goes on from a file
//! may have nothing to say for hours. So the interface speaks for it, with a frame that changes nothing at whoever hears it: a
//! reverse ARP request (RFC 903) from the guest's address, broadcast, as other virtual machine monitors send it.
//! Five of them, since the port of a bridge may take a second before it forwards.
//!
//! It waits for its machine to go on, and for a cable: a clone whose cable is pulled is not heard. Only a tap has
//! somebody behind it who learns.

use std::time::{Duration, Instant};

use crate::virtio::net::{HEADER, MAC};

/// How often it is said.
const TIMES: u8 = 5;
/// How long apart.
const APART: Duration = Duration::from_millis(250);
/// A frame without its checksum has at least these bytes (IEEE 802.3, 4.2.3.3).
const SHORTEST: usize = 60;

/// What is left to say for an interface.
#[derive(Debug, Default)]
pub(super) struct Announcement {
    left: u8,
}

impl Announcement {
    /// All of it.
    pub(super) fn begin(&mut self) {
        self.left = TIMES;
    }

    /// Nothing, if there was something.
    pub(super) fn drop(&mut self) {
        self.left = 0;
    }

    pub(super) fn is_due(&self) -> bool {
        self.left > 0
    }

    /// It was said once more.
    pub(super) fn said(&mut self) {
        self.left = self.left.saturating_sub(1);
    }
}

/// When the thread has to look at announcements again.
#[derive(Debug, Default)]
pub(super) struct Clock(Option<Instant>);

impl Clock {
    /// At once.
    pub(super) fn now(&mut self) {
        self.0 = Some(Instant::now());
    }

    /// After the usual time, or never.
    pub(super) fn later(&mut self, more: bool) {
        self.0 = more.then(|| Instant::now() + APART);
    }

    pub(super) fn has_struck(&self) -> bool {
        self.0.is_some_and(|at| at <= Instant::now())
    }

    /// Milliseconds that the thread may sleep, for epoll: -1 for ever.
    pub(super) fn timeout(&self) -> i32 {
        let left = self.0.map(|at| at.duration_since(Instant::now()));
        // Rounded up, so that it has struck then; at most `APART`.
        left.map_or(-1, |left| {
            i32::try_from(left.as_millis())
                .unwrap_or(0)
                .saturating_add(1)
        })
    }
}

/// The packet, with the header that says nothing of it.
pub(super) fn packet(mac: [u8; MAC]) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; MAC]);
    packet.extend(mac);
    // Reverse ARP; Ethernet, IPv4, the lengths of their addresses; "request reverse".
    packet.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for address in [mac, mac] {
        packet.extend(address);
        packet.extend([0; 4]);
    }
    packet.resize(HEADER + SHORTEST, 0);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_reverse_arp_request_to_all_from_the_guest() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let packet = packet(mac);
        assert_eq!(packet.len(), HEADER + 60);
        let frame = &packet[HEADER..];
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }

    #[test]
    fn it_is_said_five_times_and_the_thread_sleeps_in_between() {
        let (mut announcement, mut clock) = (Announcement::default(), Clock::default());
        assert_eq!((announcement.is_due(), clock.timeout()), (false, -1));
        announcement.begin();
        clock.now();
        assert!(clock.has_struck());
        let mut times = 0;
        while announcement.is_due() {
            announcement.said();
            times += 1;
            clock.later(announcement.is_due());
            assert!(!clock.has_struck() && clock.timeout() <= 251);
        }
        assert_eq!((times, clock.timeout()), (5, -1));
    }
}
