// SPDX-License-Identifier: Apache-2.0
//! Machines that go on in another one at the other end of a socket, and hardly stand still.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde_json::{json, Value};
use vmbus_vmm::config::{ReceiveFrom, SendTo};
use vmbus_vmm::{EndReason, Event};

use crate::{build, requires_kvm, run, Running};

const SEND: u64 = 1000;
const RECEIVE: u64 = 1001;

impl Running {
    fn begin_send(&self, socket: impl Into<OwnedFd>, downtime: u64) {
        let to = SendTo {
            fd: socket.into().into_raw_fd(),
            downtime,
            bandwidth: 0,
        };
        self.machine.send(SEND, &to).unwrap();
    }

    fn begin_receive(&self, socket: impl Into<OwnedFd>, paused: bool) {
        let from = ReceiveFrom {
            fd: socket.into().into_raw_fd(),
            paused,
        };
        self.machine.receive(RECEIVE, &from).unwrap();
    }
}

/// A machine that waits for one that is built of the same.
fn waiting(cmdline: &str, mut change: Value) -> Running {
    change["restore"] = true.into();
    build(cmdline, change).unwrap()
}

/// Moves a machine into another.
fn moved(source: &Running, destination: &Running) -> Value {
    let (here, there) = UnixStream::pair().unwrap();
    destination.begin_receive(there, false);
    source.begin_send(here, 100);
    let (sent, events) = source.answer(SEND);
    assert_eq!(events, [Event::Paused]);
    assert_eq!(source.end(), (EndReason::Migrated, String::new()));
    let (received, events) = destination.answer(RECEIVE);
    assert_eq!(events, [Event::Running]);
    assert!(received.unwrap()["received"].as_u64().unwrap() > 0);
    sent.unwrap()
}

#[test]
fn a_guest_goes_on_elsewhere_with_all_of_its_memory() {
    requires_kvm!();
    let mode = "dirty mib=16 beat=1 count=60";
    let mut source = run(mode, json!({}));
    source.until("pass 3\n");
    let mut destination = waiting(mode, json!({}));
    let statistics = moved(&source, &destination);
    let mut text = source.drain();
    text += &destination.until("all was well");
    let passes: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("pass"))
        .collect();
    let wanted: Vec<_> = (1..=60).map(|pass| format!("pass {pass}")).collect();
    assert_eq!(passes, wanted);
    assert!(statistics["rounds"].as_u64().unwrap() >= 1, "{statistics}");
    eprintln!("{statistics}");
    assert_eq!(destination.end().0, EndReason::GuestPoweroff);
}
