// SPDX-License-Identifier: Apache-2.0
//! A network interface on a real tap and bridge, in a network namespace of the test's own.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{build, requires_kvm, run, Running};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR, as the broker has them.
const FLAGS: i16 = 0x0002 | 0x0100 | 0x1000 | 0x4000;
const MAC: &str = "52:54:00:12:34:56";

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(done.success(), "ip {words}");
}

/// A tap with `queues` queues on a bridge with address 10.99.0.1, in a network of this thread's own; None where
/// this host or this user does not allow that.
pub fn tap(queues: usize) -> Option<Vec<RawFd>> {
    // SAFETY: it changes this thread's network namespace, and nothing else.
    let alone = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !alone || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("absent: a network namespace with taps");
        return None;
    }
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    request[16..18].copy_from_slice(&FLAGS.to_le_bytes());
    let mut fds = Vec::new();
    for _ in 0..queues {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        // SAFETY: the request is a struct ifreq of 40 bytes, which outlives the call.
        let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        fds.push(tun.into_raw_fd());
    }
    ip("link add br0 type bridge");
    ip("address add 10.99.0.1/24 dev br0");
    ip("link set br0 up");
    ip("link set tap0 master br0 up");
    Some(fds)
}

pub(crate) fn nic(fds: &[RawFd]) -> Value {
    json!({ "nics": [{ "id": "net", "mac": MAC, "tap_fds": fds }], "vcpus": fds.len().min(2) })
}

/// Waits until the guest's driver has been started `times` times, and what the tap had before was thrown away.
///
/// The thread of the network takes its commands in order, so a pause comes after the start.
pub(crate) fn begun(guest: &mut Running, times: usize) {
    while guest.until("net: mac").matches("net: mac").count() < times {
        std::thread::sleep(Duration::from_millis(20));
        guest.drain();
    }
    assert_eq!(guest.must(Request::Pause), [Event::Paused]);
    assert_eq!(guest.must(Request::Resume), [Event::Running]);
}

/// Pings the guest with so many bytes of data; how many of `count` were answered.
pub(crate) fn ping(count: u32, bytes: u32) -> usize {
    let done = Command::new("busybox")
        .args(["ping", "-i", "0.2", "-W", "10", "-c"])
        .args([&count.to_string(), "-s", &bytes.to_string(), "10.99.0.2"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    eprintln!("{said}");
    said.matches("bytes from 10.99.0.2").count()
}

/// Waits until the bridge knows where the guest is.
pub(crate) fn learnt() {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let words = ["fdb", "show", "br", "br0", "brport", "tap0", "dynamic"];
        let known = Command::new("bridge").args(words).output().unwrap();
        let known = String::from_utf8_lossy(&known.stdout).into_owned();
        if known.lines().any(|line| line.starts_with(MAC)) {
            return;
        }
        assert!(Instant::now() < deadline, "the bridge knows {known:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stats(guest: &mut Running) -> Value {
    let (result, _) = guest.ask(Request::Stats);
    let all: Value = serde_json::from_str(&result.unwrap()).unwrap();
    all["devices"]["nic/net"].clone()
}

#[test]
fn a_guest_answers_pings_through_its_tap_and_bridge() {
    requires_kvm!();
    for queues in [1, 3] {
        let Some(fds) = tap(queues) else { return };
        let mut guest = run("net-echo count=6", nic(&fds));
        begun(&mut guest, 1);
        guest.until("net: mac 52:54:0:12:34:56 mtu 1500");
        assert_eq!(ping(3, 56), 3);
        assert_eq!(ping(2, 1400), 2);
        let moved = stats(&mut guest)["pair-0"].clone();
        assert!(
            moved["transmitted"]["packets"].as_u64() >= Some(5),
            "{moved}"
        );
        assert!(
            moved["received"]["bytes"].as_u64() > Some(2 * 1400),
            "{moved}"
        );
        assert_eq!(ping(1, 56), 1);
        guest.until("net: 6 echoes");
        assert_eq!(guest.end().0, EndReason::GuestPoweroff);
    }
}

#[test]
fn a_paused_guest_answers_when_it_goes_on() {
    requires_kvm!();
    let Some(fds) = tap(1) else { return };
    let mut guest = run("net-echo count=4", nic(&fds));
    begun(&mut guest, 1);
    assert_eq!(ping(1, 56), 1);
    assert_eq!(guest.must(Request::Pause), [Event::Paused]);
    // Nobody hears it now; it waits in the tap.
    let mut early = Command::new("busybox")
        .args(["ping", "-c", "1", "-W", "30", "10.99.0.2"])
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(early.try_wait().unwrap().is_none());
    assert_eq!(guest.must(Request::Resume), [Event::Running]);
    assert!(early.wait().unwrap().success());
    assert_eq!(ping(2, 56), 2);
    guest.until("net: 4 echoes");
}

#[test]
fn a_reset_machine_has_its_network_again() {
    requires_kvm!();
    let Some(fds) = tap(2) else { return };
    let mut guest = run("net-echo count=3", nic(&fds));
    begun(&mut guest, 1);
    assert_eq!(ping(1, 56), 1);
    guest.must(Request::Reset);
    begun(&mut guest, 2);
    assert_eq!(ping(3, 56), 3);
    guest.until("net: 3 echoes");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}

#[test]
fn what_is_no_tap_is_refused_by_its_slot() {
    requires_kvm!();
    let error = build("hello", nic(&[crate::fd("/dev/null")]))
        .err()
        .unwrap();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::InvalidArgument, "nic/net")
    );
}
