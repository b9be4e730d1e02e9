// SPDX-License-Identifier: Apache-2.0
//! Machines on this host's /dev/kvm, with the bare-metal guests of tests/guests.
//!
//! Without /dev/kvm each test says `absent: /dev/kvm` and passes; the guests are built by make and gcc.

mod abi;
mod bad_input;
mod copies;
mod disks;
mod ends;
mod firmware;
mod memory;
mod migrate;
mod network;
mod save;
mod snapshots;
mod states;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_qcow2::Ring;
use vmbus_vmm::thread::unconfined;
use vmbus_vmm::{Config, EndReason, Error, Event, Machine, Request};

/// Long enough for a software back end on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the test, with a word for the list of what was absent, where there is no KVM.
macro_rules! requires_kvm {
    () => {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("absent: /dev/kvm");
            return;
        }
    };
}
pub(crate) use requires_kvm;

/// The bare-metal guest, built once.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let made = std::process::Command::new("make")
            .args(["-s", "-C"])
            .arg(root.join("tests/guests"))
            .status()
            .expect("make runs");
        assert!(made.success(), "tests/guests does not build");
        root.join("build/guests/guest")
    })
}

/// A machine and the far end of its console.
pub struct Running {
    /// Dropped with this.
    pub machine: Machine,
    /// What the guest prints, and what it reads.
    pub console: UnixStream,
    printed: Vec<u8>,
    next_id: u64,
}

/// A file, open for reading.
pub fn fd(path: impl AsRef<Path>) -> i32 {
    File::open(path).unwrap().into_raw_fd()
}

/// Builds a machine of 64 MiB that runs the guest with `cmdline`; `change` replaces fields.
pub fn build(cmdline: &str, change: Value) -> Result<Running, Error> {
    build_with(cmdline, change, Vec::new())
}

/// The same with these rings for its I/O threads.
pub fn build_with(cmdline: &str, change: Value, rings: Vec<Ring>) -> Result<Running, Error> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let mut config = json!({
        "machine_type": "vmbus-2", "uuid": "11111111-2222-4333-8444-555555555555",
        "vcpus": 1, "memory": 64 << 20, "cpu_model": "host", "kvm_fd": kvm.into_raw_fd(),
        "console_fd": theirs.into_raw_fd(), "kernel": { "fd": fd(guest()), "cmdline": cmdline },
    });
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config: Config = serde_json::from_value(config).unwrap();
    Ok(Running {
        machine: Machine::build(config, rings, unconfined())?,
        console: ours,
        printed: Vec::new(),
        next_id: 1,
    })
}

/// Builds and runs.
pub fn run(cmdline: &str, change: Value) -> Running {
    run_with(cmdline, change, Vec::new())
}

/// The same with these rings for its I/O threads.
pub fn run_with(cmdline: &str, change: Value, rings: Vec<Ring>) -> Running {
    let mut running = build_with(cmdline, change, rings).unwrap();
    assert_eq!(running.must(Request::Run), [Event::Running]);
    running
}

impl Running {
    /// The next event; panics when none comes.
    pub fn event(&self) -> Event {
        let begin = Instant::now();
        loop {
            if let Some(event) = self.machine.next_event() {
                return event;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "no event; console: {}",
                String::from_utf8_lossy(&self.printed)
            );
            let mut poll = libc::pollfd {
                fd: self.machine.event_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, ours.
            unsafe { libc::poll(&mut poll, 1, 1000) };
        }
    }

    /// No event within this time.
    pub fn silence(&self, time: Duration) {
        std::thread::sleep(time);
        assert_eq!(self.machine.next_event(), None);
    }

    /// Makes a request; gives the answer and the events that came before it.
    pub fn ask(&mut self, request: Request) -> (Result<String, Error>, Vec<Event>) {
        let id = self.next_id;
        self.next_id += 1;
        self.machine.request(id, request);
        let mut before = Vec::new();
        loop {
            match self.event() {
                Event::Done { id: of, result } => {
                    assert_eq!(of, id);
                    return (result, before);
                }
                event => before.push(event),
            }
        }
    }

    /// Makes a request that must succeed; gives the events that came before the answer.
    pub fn must(&mut self, request: Request) -> Vec<Event> {
        let (result, before) = self.ask(request);
        result.unwrap();
        before
    }

    /// Reads the console until `text` was printed; gives everything so far.
    pub fn until(&mut self, text: &str) -> String {
        self.console
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let begin = Instant::now();
        loop {
            let so_far = String::from_utf8_lossy(&self.printed).into_owned();
            if so_far.contains(text) {
                return so_far;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "{text:?} was not printed, but: {so_far}"
            );
            let mut bytes = [0; 4096];
            if let Ok(len) = self.console.read(&mut bytes) {
                self.printed.extend_from_slice(&bytes[..len]);
            }
        }
    }

    /// Reads what was printed so far, without waiting; gives all of it.
    pub fn drain(&mut self) -> String {
        self.console.set_nonblocking(true).unwrap();
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = self.console.read(&mut bytes) {
            self.printed.extend_from_slice(&bytes[..len]);
        }
        self.console.set_nonblocking(false).unwrap();
        String::from_utf8_lossy(&self.printed).into_owned()
    }

    /// Types.
    pub fn send(&mut self, text: &str) {
        self.console.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for the end.
    pub fn end(&self) -> (EndReason, String) {
        loop {
            if let Event::Ended { reason, detail } = self.event() {
                return (reason, detail);
            }
        }
    }
}
