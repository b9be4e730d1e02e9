// SPDX-License-Identifier: Apache-2.0
//! What a tap's kernel does with a packet from the driver, done in software: checksums, and TCP segments cut into
//! frames. For links that carry plain Ethernet frames and nothing beside them.
//!
//! The driver is offered the same features whatever the link, so it leaves both to us. A packet whose header does
//! not fit its frame is refused; so is a segment size so small that one packet would become thousands of frames.
//! Sources: virtio 1.2, 5.1.6.2 (the header); RFC 1071 (checksum), 9293 (TCP), 3168 (CWR), 791, 8200.

use super::interface::{ETHERNET, VLAN};
use crate::virtio::net::HEADER;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;
/// The least segment that is cut: what Linux takes for the least MSS (TCP_MIN_SND_MSS).
const SEGMENT_MIN: usize = 48;
const TCP_CSUM: usize = 16;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Gives the frames that `packet`, with its virtio-net header, is: one, or one a segment. `scratch` is used again
/// from call to call. None if it is malformed; then nothing was given.
pub(super) fn cut(
    packet: &mut [u8],
    scratch: &mut Vec<u8>,
    mut give: impl FnMut(&[u8]),
) -> Option<()> {
    let (header, frame) = packet.split_at_mut_checked(HEADER)?;
    let flags = *header.first()?;
    let gso = *header.get(1)?;
    let field = |at: usize| -> Option<usize> {
        let bytes = header.get(at..at.checked_add(2)?)?;
        Some(usize::from(u16::from_le_bytes(bytes.try_into().ok()?)))
    };
    let (size, start, offset) = (field(4)?, field(6)?, field(8)?);
    if frame.len() < ETHERNET {
        return None;
    }
    if gso == 0 {
        if flags & NEEDS_CSUM != 0 {
            complete(frame, start, offset)?;
        }
        give(frame);
        return Some(());
    }
    let ipv6 = match gso & !GSO_ECN {
        GSO_TCPV4 => false,
        GSO_TCPV6 => true,
        _ => return None,
    };
    if flags & NEEDS_CSUM == 0 || offset != TCP_CSUM || size < SEGMENT_MIN {
        return None;
    }
    let layout = Layout::of(frame, start, ipv6)?;
    let (headers, payload) = frame.split_at_checked(layout.payload)?;
    let last = payload.len().div_ceil(size).max(1);
    let mut pieces = payload.chunks(size);
    for index in 0..last {
        let piece = pieces.next().unwrap_or_default();
        scratch.clear();
        scratch.extend_from_slice(headers);
        scratch.extend_from_slice(piece);
        layout.fit(scratch, index, size, index.checked_add(1)? == last)?;
        give(scratch);
    }
    Some(())
}

/// Where the parts of a TCP packet begin.
struct Layout {
    ip: usize,
    tcp: usize,
    payload: usize,
    ipv6: bool,
}

impl Layout {
    /// None when it is not what the header says: TCP at `tcp` in an IP packet of that version.
    fn of(frame: &[u8], tcp: usize, ipv6: bool) -> Option<Layout> {
        let tagged = matches!(get16(frame, 12)?, 0x8100 | 0x88a8);
        let ip = ETHERNET.checked_add(if tagged { VLAN } else { 0 })?;
        let kind = get16(frame, ip.checked_sub(2)?)?;
        let first = *frame.get(ip)?;
        let fits = if ipv6 {
            kind == 0x86dd && first >> 4 == 6 && tcp >= ip.checked_add(40)?
        } else {
            let len = usize::from(first & 15).checked_mul(4)?;
            kind == 0x0800 && first >> 4 == 4 && len >= 20 && tcp == ip.checked_add(len)?
        };
        let offset = usize::from(*frame.get(tcp.checked_add(12)?)? >> 4).checked_mul(4)?;
        let payload = tcp.checked_add(offset)?;
        (fits && offset >= 20 && payload <= frame.len()).then_some(Layout {
            ip,
            tcp,
            payload,
            ipv6,
        })
    }

    /// Makes `frame`, the headers of the whole and one piece of its payload, a frame of its own.
    fn fit(&self, frame: &mut [u8], index: usize, size: usize, last: bool) -> Option<()> {
        let Layout { ip, tcp, .. } = *self;
        let behind_ip = frame.len().checked_sub(ip)?;
        let transport = u16::try_from(frame.len().checked_sub(tcp)?).ok()?;
        let addresses = if self.ipv6 {
            put16(
                frame,
                ip.checked_add(4)?,
                u16::try_from(behind_ip.checked_sub(40)?).ok()?,
            )?;
            ip.checked_add(8)?..ip.checked_add(40)?
        } else {
            put16(frame, ip.checked_add(2)?, u16::try_from(behind_ip).ok()?)?;
            let id = get16(frame, ip.checked_add(4)?)?;
            put16(frame, ip.checked_add(4)?, id.wrapping_add(index as u16))?;
            put16(frame, ip.checked_add(10)?, 0)?;
            let checksum = !fold(sum(frame.get(ip..tcp)?));
            put16(frame, ip.checked_add(10)?, checksum)?;
            ip.checked_add(12)?..ip.checked_add(20)?
        };
        let sequence = frame.get_mut(tcp.checked_add(4)?..tcp.checked_add(8)?)?;
        let first = u32::from_be_bytes(<[u8; 4]>::try_from(&*sequence).ok()?);
        let here = first.wrapping_add(index.checked_mul(size)? as u32);
        sequence.copy_from_slice(&here.to_be_bytes());
        let flags = frame.get_mut(tcp.checked_add(13)?)?;
        if !last {
            *flags &= !(FIN | PSH);
        }
        if index > 0 {
            *flags &= !CWR;
        }
        put16(frame, tcp.checked_add(TCP_CSUM)?, 0)?;
        let pseudo = sum(frame.get(addresses)?)
            .checked_add(u64::from(transport))?
            .checked_add(6)?;
        let all = sum(frame.get(tcp..)?).checked_add(pseudo)?;
        put16(frame, tcp.checked_add(TCP_CSUM)?, !fold(all))
    }
}

/// Computes the checksum from `start` on and puts it `offset` behind that, where the pseudo header's sum is.
fn complete(frame: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let checksum = match !fold(sum(frame.get(start..)?)) {
        // UDP has 0 for "none"; for all others the two mean the same.
        0 => 0xffff,
        checksum => checksum,
    };
    put16(frame, start.checked_add(offset)?, checksum)
}

fn get16(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(two.try_into().ok()?))
}

fn put16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    let two = bytes.get_mut(at..at.checked_add(2)?)?;
    two.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// The sum of 16-bit words, an odd byte filled up with 0. At most some 64 KiB: it does not overflow.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(2);
    let odd = words.remainder().first();
    let last = odd.map_or(0, |byte| u64::from(*byte) << 8);
    words.fold(last, |sum, word| match word {
        [high, low] => sum.wrapping_add(u64::from(u16::from_be_bytes([*high, *low]))),
        _ => sum,
    })
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of `len` bytes of payload, to be cut every `size` bytes.
    fn segment(ipv6: bool, tagged: bool, len: usize, size: u16, flags: u8) -> Vec<u8> {
        let mut frame: Vec<u8> = (0..12).collect();
        if tagged {
            frame.extend([0x81, 0, 0, 5]);
        }
        frame.extend(if ipv6 { [0x86, 0xdd] } else { [8, 0] });
        let tcp = if ipv6 {
            frame.extend([0x60, 0, 0, 0, 0xff, 0xff, 6, 64]);
            frame.extend(0..32);
            frame.len()
        } else {
            frame.extend([0x46, 0, 0xff, 0xff, 0xff, 0xff, 0x40, 0, 64, 6, 1, 2]);
            frame.extend([10, 99, 0, 2, 10, 99, 0, 1, 1, 1, 1, 1]);
            frame.len()
        };
        frame.extend([0, 80, 1, 2, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9, 0x60, flags]);
        frame.extend([1, 0, 0xaa, 0xbb, 0, 0, 1, 1, 1, 1]);
        frame.extend((0..len).map(|n| n as u8));
        let kind = if ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
        let mut packet = vec![NEEDS_CSUM, kind];
        for value in [0, size, tcp as u16, TCP_CSUM as u16, 0] {
            packet.extend(value.to_le_bytes());
        }
        packet.extend(frame);
        packet
    }

    fn frames(packet: &[u8]) -> Option<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        let mut packet = packet.to_vec();
        cut(&mut packet, &mut Vec::new(), |frame| {
            found.push(frame.to_vec())
        })?;
        Some(found)
    }

    /// As a receiver computes it: with the checksum in it, the sum is all ones.
    fn is_whole(frame: &[u8], ip: usize, ipv6: bool) {
        let tcp = ip + if ipv6 { 40 } else { 24 };
        if !ipv6 {
            assert_eq!(fold(sum(&frame[ip..tcp])), 0xffff);
            assert_eq!(get16(frame, ip + 2), Some((frame.len() - ip) as u16));
        } else {
            assert_eq!(get16(frame, ip + 4), Some((frame.len() - ip - 40) as u16));
        }
        let addresses = if ipv6 { 8..40 } else { 12..20 };
        let pseudo = sum(&frame[ip + addresses.start..ip + addresses.end]);
        let len = (frame.len() - tcp) as u64;
        assert_eq!(fold(sum(&frame[tcp..]) + pseudo + len + 6), 0xffff);
    }

    #[test]
    fn a_segment_becomes_frames_that_carry_its_bytes_in_order() {
        for (ipv6, tagged) in [(false, false), (true, false), (false, true)] {
            let packet = segment(ipv6, tagged, 3001, 1000, CWR | PSH | FIN | 0x10);
            let found = frames(&packet).unwrap();
            assert_eq!(found.len(), 4);
            let ip = if tagged { 18 } else { 14 };
            let tcp = ip + if ipv6 { 40 } else { 24 };
            let mut bytes = Vec::new();
            for (index, frame) in found.iter().enumerate() {
                is_whole(frame, ip, ipv6);
                let sequence = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xffff_fff0u32.wrapping_add(index as u32 * 1000));
                let flags = [CWR | 0x10, 0x10, 0x10, PSH | FIN | 0x10][index];
                assert_eq!(frame[tcp + 13], flags);
                bytes.extend_from_slice(&frame[tcp + 24..]);
            }
            assert_eq!(bytes, packet[packet.len() - 3001..]);
        }
    }

    #[test]
    fn each_frame_of_ipv4_has_an_identification_of_its_own() {
        let found = frames(&segment(false, false, 200, 100, 0x10)).unwrap();
        let ids: Vec<_> = found
            .iter()
            .map(|frame| get16(frame, 18).unwrap())
            .collect();
        assert_eq!(ids, [0xffff, 0]);
    }

    #[test]
    fn a_segment_without_payload_is_one_frame() {
        let found = frames(&segment(false, false, 0, 100, 0x10)).unwrap();
        assert_eq!(found.len(), 1);
        is_whole(&found[0], 14, false);
    }

    #[test]
    fn a_checksum_is_completed_and_is_never_zero() {
        let mut packet = vec![NEEDS_CSUM, 0, 0, 0, 0, 0, 14, 0, 6, 0, 0, 0];
        packet.extend([0; 14]);
        packet.extend([0xff, 0xff, 0, 0, 0, 0, 0, 0]);
        let found = frames(&packet).unwrap();
        assert_eq!(found[0][14..], [0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff]);
    }

    #[test]
    fn a_plain_frame_stays_as_it_is() {
        let mut packet = vec![0; HEADER];
        packet.extend(0..60);
        assert_eq!(frames(&packet).unwrap(), [packet[HEADER..].to_vec()]);
    }

    #[test]
    fn what_does_not_fit_its_header_is_refused() {
        let good = segment(false, false, 500, 100, 0x10);
        assert!(frames(&good).is_some());
        for (at, value) in [
            (0, 0),     // no checksum wanted
            (1, 3),     // UDP
            (1, 4),     // IPv6
            (4, 47),    // too small
            (6, 39),    // TCP elsewhere
            (7, 0xff),  // TCP behind the end
            (8, 6),     // another checksum
            (26, 0x45), // another length of the IP header
            (24, 9),    // no IP
            (62, 0x40), // a TCP header too short
            (62, 0xf0), // and one that is longer than is possible here
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            if at == 62 && value == 0xf0 {
                bad.truncate(12 + 38 + 40);
            }
            assert_eq!(frames(&bad), None, "{at}");
        }
        assert_eq!(frames(&good[..20]), None);
        assert_eq!(frames(&[]), None);
        let mut short = vec![NEEDS_CSUM, 0, 0, 0, 0, 0, 60, 0, 6, 0, 0, 0];
        short.extend([0; 60]);
        assert_eq!(frames(&short), None);
    }

    #[test]
    fn no_packet_makes_it_panic_or_give_more_than_it_got() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..20_000 {
            let mut packet = segment(
                round % 2 == 0,
                round % 3 == 0,
                (next() % 3000) as usize,
                100,
                0,
            );
            for _ in 0..next() % 4 {
                let at = (next() % 80) as usize;
                if let Some(byte) = packet.get_mut(at) {
                    *byte = next() as u8;
                }
            }
            packet.truncate((next() % 4000) as usize);
            let len = packet.len();
            let (mut count, mut bytes) = (0, 0);
            cut(&mut packet, &mut Vec::new(), |frame| {
                count += 1;
                bytes += frame.len();
            });
            assert!(count <= len / SEGMENT_MIN + 1);
            assert!(bytes <= len * 10);
        }
    }
}
