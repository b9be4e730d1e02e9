// SPDX-License-Identifier: Apache-2.0
//! The whole device on links that are no taps.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::tests::{packet, stats, Nic, RX, TX, TX2};
use super::{Link, Stream};
use crate::virtio::net::HEADER;
use crate::virtio::rig::{until, Rig, MAC};

/// An interface on a stream, and the stream's other end.
fn on_stream() -> (Rig, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let link = Link::Stream(Box::new(Stream::new(theirs.into()).unwrap()));
    (Rig::linked(None, link, Vec::new()), ours)
}

fn put_frame(stream: &mut UnixStream, frame: &[u8]) {
    let len = (frame.len() as u32).to_be_bytes();
    stream.write_all(&[&len, frame].concat()).unwrap();
}

fn take_frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    stream.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn a_stream_carries_frames_without_their_header() {
    let (rig, mut wire) = on_stream();
    let mut nic = Nic::all(&rig);
    for (queue, len) in [(TX, 300), (TX2, 60)] {
        let sent = packet([1; 6], len);
        nic.send(queue, &sent);
        assert_eq!(take_frame(&mut wire), sent[HEADER..]);
    }
    // Two frames in one piece, and one in three.
    let (first, second) = (packet(MAC, 100), packet(MAC, 200));
    put_frame(&mut wire, &first[HEADER..]);
    put_frame(&mut wire, &second[HEADER..]);
    nic.buffers(RX, &[2048; 3]);
    nic.wait(RX, 2);
    assert_eq!(nic.queue(RX).used(1), (1, 212));
    let got = nic.bytes(RX, 1, 212);
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(got[12..], second[12..]);
    for piece in [&[0, 0][..], &[0, 100], &first[HEADER..]] {
        assert_eq!(nic.queue(RX).used_index(), 2);
        wire.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    nic.wait(RX, 3);
    assert_eq!(nic.queue(RX).used(2), (2, 112));
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["bytes"], 300);
}

#[test]
fn a_checksum_that_the_driver_left_is_in_the_stream() {
    let (rig, mut wire) = on_stream();
    let mut nic = Nic::all(&rig);
    let mut sent = packet([1; 6], 20);
    sent[0] = 1;
    sent[6] = 14;
    sent[8] = 2;
    sent[HEADER + 14..].copy_from_slice(&[0x12, 0x34, 0, 0, 0, 1]);
    nic.send(TX, &sent);
    let frame = take_frame(&mut wire);
    assert_eq!(frame[14..], [0x12, 0x34, 0xed, 0xca, 0, 1]);
    sent[6] = 200;
    nic.send(TX, &sent);
    nic.wait(TX, 2);
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 1);
}

#[test]
fn a_stream_that_is_not_read_makes_the_driver_wait_and_loses_nothing() {
    let (rig, mut wire) = on_stream();
    let mut nic = Nic::all(&rig);
    let mut sent: u16 = 0;
    let mut quiet = 0;
    while quiet < 10 {
        if nic.queue(TX).used_index() == sent {
            nic.send(TX, &packet([sent as u8; 6], 1500));
            sent += 1;
            quiet = 0;
        } else {
            std::thread::sleep(Duration::from_millis(10));
            quiet += 1;
        }
    }
    assert!(sent > 100, "{sent}");
    for number in 0..sent {
        assert_eq!(take_frame(&mut wire)[..6], [number as u8; 6]);
    }
    nic.wait(TX, sent);
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 0);
}

#[test]
fn a_stream_that_breaks_its_rules_or_ends_is_a_cable_with_nothing_at_its_end() {
    for bad in [&[0, 0, 0, 13][..], &[0xff, 0, 0, 0], &[]] {
        let (rig, mut wire) = on_stream();
        let mut nic = Nic::all(&rig);
        nic.buffers(RX, &[2048; 2]);
        put_frame(&mut wire, &packet(MAC, 100)[HEADER..]);
        nic.wait(RX, 1);
        wire.write_all(bad).unwrap();
        if bad.is_empty() {
            wire.shutdown(std::net::Shutdown::Write).unwrap();
        }
        assert_eq!(wire.read(&mut [0; 10]).unwrap(), 0);
        nic.send(TX, &packet([1; 6], 100));
        nic.wait(TX, 1);
        assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 1);
        assert_eq!(nic.guest.status(), 15);
    }
}

/// A pair of sockets as the service makes them.
fn pair() -> (File, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two fds.
    let made =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    assert_eq!(made, 0);
    // SAFETY: both are new and ours.
    unsafe { (File::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}

/// An interface in an isolated network, and members of these names.
fn in_network<const N: usize>(names: [&str; N]) -> (Rig, [File; N]) {
    let rig = Rig::linked(None, Link::Hub(Box::default()), Vec::new());
    let members = names.map(|name| join(&rig, name));
    (rig, members)
}

fn join(rig: &Rig, name: &str) -> File {
    let (ours, theirs) = pair();
    rig.device("nic/net").link(name.to_owned(), theirs).unwrap();
    ours
}

/// What waits in a member's socket, a frame each.
fn waiting(member: &mut File) -> Vec<Vec<u8>> {
    super::tap::non_blocking(member).unwrap();
    let mut frames = Vec::new();
    let mut bytes = [0; 70000];
    while let Ok(len @ 1..) = member.read(&mut bytes) {
        frames.push(bytes[..len].to_vec());
    }
    frames
}

const A: [u8; 6] = [0x52, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [0x52, 0, 0, 0, 0, 0xb];

/// A frame without its header.
fn frame(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let mut frame = packet(to, 60).split_off(HEADER);
    frame[6..12].copy_from_slice(&from);
    frame
}

#[test]
fn a_frame_goes_to_whom_it_is_for_once_that_one_was_heard() {
    let (rig, [mut a, mut b]) = in_network(["a", "b"]);
    let mut nic = Nic::all(&rig);
    nic.send(TX, &packet(A, 100));
    nic.wait(TX, 1);
    assert_eq!((waiting(&mut a).len(), waiting(&mut b).len()), (1, 1));
    nic.buffers(RX, &[2048; 4]);
    a.write_all(&frame(MAC, A)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(
        nic.bytes(RX, 0, 72)[..12],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(nic.bytes(RX, 0, 72)[12..], frame(MAC, A));
    nic.send(TX, &packet(A, 100));
    nic.send(TX2, &packet([0xff; 6], 100));
    nic.wait(TX, 2);
    nic.wait(TX2, 1);
    let (to_a, to_b) = (waiting(&mut a), waiting(&mut b));
    assert_eq!((to_a.len(), to_b.len()), (2, 1));
    assert_eq!(to_a[0], packet(A, 100)[HEADER..]);
    // It moves.
    b.write_all(&frame(MAC, A)).unwrap();
    nic.wait(RX, 2);
    nic.send(TX, &packet(A, 100));
    nic.wait(TX, 3);
    assert_eq!((waiting(&mut a).len(), waiting(&mut b).len()), (0, 1));
}

#[test]
fn a_member_that_ends_is_forgotten_and_comes_again_under_its_name() {
    let (rig, [a, mut b]) = in_network(["a", "b"]);
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[2048; 8]);
    let mut a = a;
    a.write_all(&frame(MAC, A)).unwrap();
    nic.wait(RX, 1);
    drop(a);
    until("its address is forgotten", || {
        let sent = nic.queue(TX).used_index();
        nic.send(TX, &packet(A, 60));
        nic.wait(TX, sent + 1);
        !waiting(&mut b).is_empty()
    });
    let mut a = join(&rig, "a");
    a.write_all(&frame(MAC, A)).unwrap();
    nic.wait(RX, 2);
    let mut again = join(&rig, "a");
    assert_eq!(a.read(&mut [0; 10]).unwrap(), 0);
    again.write_all(&frame(MAC, B)).unwrap();
    nic.wait(RX, 3);
}

#[test]
fn a_member_that_does_not_read_holds_up_nobody() {
    let (rig, [_deaf, mut b]) = in_network(["a", "b"]);
    let mut nic = Nic::all(&rig);
    for number in 0..1000 {
        nic.send(TX, &packet(B, 1500));
        nic.wait(TX, number + 1);
        assert_eq!(waiting(&mut b).len(), 1);
    }
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 0);
}

#[test]
fn a_network_has_sixty_four_members_and_takes_no_frame_that_is_none() {
    let names: Vec<String> = (0..63).map(|n| n.to_string()).collect();
    let (rig, []) = in_network([]);
    let mut members: Vec<File> = names.iter().map(|name| join(&rig, name)).collect();
    let refused = rig.device("nic/net").link("one more".to_owned(), pair().1);
    assert_eq!(refused.unwrap_err().argument, "peer");
    assert!(rig
        .device("disk/root")
        .link("a".to_owned(), pair().1)
        .is_err());
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[2048; 8]);
    members[62].write_all(&[1; 13]).unwrap();
    members[62].write_all(&frame(MAC, A)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(nic.bytes(RX, 0, 72)[12..], frame(MAC, A));
}
