// SPDX-License-Identifier: Apache-2.0
//! Machines that go on in another one at the other end of a socket, and hardly stand still.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{json, Value};
use vmbus_vmm::config::{ReceiveFrom, SendTo};
use vmbus_vmm::migrate::stream::{preamble, Header, Kind as Record, HEADER, PLAIN, PREAMBLE};
use vmbus_vmm::{EndReason, Error, Event, Kind, Request};

use crate::firmware::{bootable, requires_seabios, Directory, SEABIOS};
use crate::{build, fd, requires_kvm, run, Running, PATIENCE};

pub(crate) const SEND: u64 = 1000;
pub(crate) const RECEIVE: u64 = 1001;

impl Running {
    fn begin_send(&self, socket: impl Into<OwnedFd>) {
        self.begin_send_at(socket, 300, 0);
    }

    fn begin_send_at(&self, socket: impl Into<OwnedFd>, downtime: u64, bandwidth: u64) {
        let to = SendTo {
            fd: socket.into().into_raw_fd(),
            downtime,
            bandwidth,
            copy: Vec::new(),
        };
        self.machine.send(SEND, &to).unwrap();
    }

    fn begin_receive(&self, socket: impl Into<OwnedFd>, paused: bool) {
        let from = ReceiveFrom {
            fd: socket.into().into_raw_fd(),
            paused,
            copy: Vec::new(),
            separate: Vec::new(),
        };
        self.machine.receive(RECEIVE, &from).unwrap();
    }
}

/// A machine that waits for one that is built of the same.
pub(crate) fn waiting(cmdline: &str, mut change: Value) -> Running {
    change["restore"] = true.into();
    build(cmdline, change).unwrap()
}

/// Moves a machine into another.
fn moved(source: &Running, destination: &Running) -> Value {
    let (here, there) = UnixStream::pair().unwrap();
    destination.begin_receive(there, false);
    source.begin_send(here);
    let (sent, events) = source.answer(SEND);
    assert_eq!(events, [Event::Paused]);
    assert_eq!(source.end(), (EndReason::Migrated, String::new()));
    let (received, events) = destination.answer(RECEIVE);
    assert_eq!(events, [Event::Running]);
    assert!(received.unwrap()["received"].as_u64().unwrap() > 0);
    sent.unwrap()
}

/// The numbers of passes that a guest that dirties its memory has told, which go on without a gap.
fn passes(text: &str) -> u64 {
    let lines = text.lines().filter_map(|line| line.strip_prefix("pass "));
    let numbers: Vec<u64> = lines.map(|number| number.parse().unwrap()).collect();
    assert!(
        numbers.iter().copied().eq(1..=numbers.len() as u64),
        "{numbers:?} of {text}"
    );
    numbers.len() as u64
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
    assert_eq!(passes(&text), 60);
    assert!(statistics["rounds"].as_u64().unwrap() >= 1, "{statistics}");
    assert!(
        statistics["sent"].as_u64().unwrap() > 16 << 20,
        "{statistics}"
    );
    assert_eq!(destination.end().0, EndReason::GuestPoweroff);
}

#[test]
fn all_vcpus_go_and_over_tcp_as_well() {
    requires_kvm!();
    let smp = json!({ "vcpus": 4 });
    let mut source = run("smp cpus=4 busy", smp.clone());
    source.until("busy");
    let destination = waiting("smp cpus=4 busy", smp);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (there, _) = listener.accept().unwrap();
    destination.begin_receive(there, false);
    source.begin_send(here);
    source.answer(SEND).0.unwrap();
    destination.answer(RECEIVE).0.unwrap();
    assert_eq!(source.end().0, EndReason::Migrated);
    let mut destination = destination;
    let begin = std::time::Instant::now();
    loop {
        let stats: Value =
            serde_json::from_str(&destination.ask(Request::Stats).0.unwrap()).unwrap();
        let vcpus = stats["vcpus"].as_array().unwrap().clone();
        if vcpus
            .iter()
            .all(|vcpu| vcpu["exits"].as_u64().unwrap() > 10)
        {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "a vCPU does not go on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn one_that_was_paused_or_is_to_be_stands_where_it_comes_to() {
    requires_kvm!();
    for (before, asked) in [(true, false), (false, true)] {
        let mut source = run("dirty mib=4", json!({}));
        source.until("pass 2\n");
        if before {
            source.must(Request::Pause);
        }
        let mut destination = waiting("dirty mib=4", json!({}));
        let (here, there) = UnixStream::pair().unwrap();
        destination.begin_receive(there, asked);
        source.begin_send(here);
        source.answer(SEND).0.unwrap();
        let (received, events) = destination.answer(RECEIVE);
        received.unwrap();
        assert_eq!(events, [Event::Paused]);
        let so_far = passes_so_far(&mut source);
        // The end of a line may have come along that the source's console had not taken; none begins.
        let rest = destination.drain();
        assert!(!rest.contains('p'), "{rest:?}");
        destination.must(Request::Resume);
        destination.until(&format!("pass {}\n", so_far + 3));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

/// What somebody in between does with a record.
pub(crate) enum Fate {
    Pass,
    /// It does not arrive, and the connection is broken.
    Cut,
}

/// Decides about a record: its way, its number on that way, its header and its body.
pub(crate) type Judge = dyn FnMut(Way, usize, &mut [u8; HEADER], &mut Vec<u8>) -> Fate + Send;

/// Somebody between source and destination, who sees every record.
pub(crate) struct Between {
    threads: Vec<JoinHandle<()>>,
}

impl Between {
    /// With the ends for source and destination.
    pub(crate) fn new(judge: Box<Judge>) -> (Between, UnixStream, UnixStream) {
        let (here, left) = UnixStream::pair().unwrap();
        let (right, there) = UnixStream::pair().unwrap();
        let judge = Arc::new(Mutex::new(judge));
        let (left_again, right_again) = (left.try_clone().unwrap(), right.try_clone().unwrap());
        let other = Arc::clone(&judge);
        let threads = vec![
            std::thread::spawn(move || {
                let mut bytes = [0; PREAMBLE];
                if (&left).read_exact(&mut bytes).is_ok() {
                    let _ = (&right).write_all(&bytes);
                }
                carry(Way::ToDestination, &left, &right, &judge);
            }),
            std::thread::spawn(move || {
                carry(Way::ToSource, &right_again, &left_again, &other);
            }),
        ];
        (Between { threads }, here, there)
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn carry(way: Way, from: &UnixStream, to: &UnixStream, judge: &Mutex<Box<Judge>>) {
    let (mut from, mut to) = (from, to);
    for number in 0.. {
        let mut header = [0; HEADER];
        if from.read_exact(&mut header).is_err() {
            break;
        }
        let len = u32::from_le_bytes(header[8..12].try_into().unwrap());
        let mut body = vec![0; len as usize];
        if from.read_exact(&mut body).is_err() {
            break;
        }
        let fate = judge.lock().unwrap()(way, number, &mut header, &mut body);
        if matches!(fate, Fate::Cut) {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        if to.write_all(&header).is_err() || to.write_all(&body).is_err() {
            break;
        }
    }
    // What comes the other way still arrives.
    let _ = from.shutdown(Shutdown::Read);
    let _ = to.shutdown(Shutdown::Write);
}

pub(crate) fn kind(header: &[u8; HEADER]) -> Record {
    Header::parse(header).unwrap().kind
}

/// What became of both when somebody in between judged so.
fn between(
    source: &Running,
    destination: &Running,
    judge: impl FnMut(Way, usize, &mut [u8; HEADER], &mut Vec<u8>) -> Fate + Send + 'static,
) -> (Result<Value, Error>, Result<Value, Error>) {
    let (between, here, there) = Between::new(Box::new(judge));
    destination.begin_receive(there, false);
    source.begin_send(here);
    let sent = source.answer(SEND).0;
    let received = destination.answer(RECEIVE).0;
    drop(between);
    (sent, received)
}

/// The same when the connection breaks before the first such record arrives.
fn cut_at(
    last: Record,
    source: &Running,
    destination: &Running,
) -> (Result<Value, Error>, Result<Value, Error>) {
    between(source, destination, move |_, _, header, _| {
        match kind(header) == last {
            true => Fate::Cut,
            false => Fate::Pass,
        }
    })
}

const MODE: &str = "dirty mib=4";

fn dirty() -> Running {
    let mut source = run(MODE, json!({}));
    source.until("pass 2\n");
    source
}

/// The guest goes on here, and nothing of its memory is lost.
fn goes_on(source: &mut Running) {
    let so_far = passes_so_far(source);
    let text = source.until(&format!("pass {}\n", so_far + 3));
    assert!(!text.contains("page"), "{text}");
}

/// One that is being printed may lack its end.
fn passes_so_far(guest: &mut Running) -> u64 {
    let text = guest.drain();
    passes(text.rsplit_once('\n').map_or("", |(whole, _)| whole))
}

#[test]
fn a_connection_that_breaks_at_any_record_leaves_the_machine_in_one_place() {
    requires_kvm!();
    use Record::{Accepted, Facts, Go, Last, Pages, Ready, Round, Zeros};
    let mut source = dirty();
    for last in [Facts, Accepted, Pages, Zeros, Round, Last, Ready] {
        let destination = waiting(MODE, json!({}));
        let (sent, received) = cut_at(last, &source, &destination);
        assert_eq!(sent.unwrap_err().kind, Kind::Disconnected, "{last:?}");
        assert_eq!(received.unwrap_err().kind, Kind::Disconnected, "{last:?}");
        assert_eq!(destination.end().0, EndReason::Error, "{last:?}");
        goes_on(&mut source);
    }
    // `go` is on its way: the source cannot know, and stands until somebody says so.
    let destination = waiting(MODE, json!({}));
    let (sent, received) = cut_at(Go, &source, &destination);
    let error = sent.unwrap_err();
    assert_eq!(error.kind, Kind::Disconnected);
    assert!(error.message.contains("stands here"), "{error}");
    assert_eq!(received.unwrap_err().kind, Kind::Disconnected);
    assert_eq!(destination.end().0, EndReason::Error);
    while source.machine.next_event().is_some() {}
    let again = source.ask_to_send();
    assert_eq!(again.unwrap_err().kind, Kind::InvalidState);
    source.must(Request::Resume);
    goes_on(&mut source);
}

impl Running {
    /// To nobody.
    fn ask_to_send(&self) -> Result<Value, Error> {
        let (here, _there) = UnixStream::pair().unwrap();
        self.begin_send(here);
        self.answer(SEND).0
    }
}

#[test]
fn when_its_last_word_is_lost_the_destination_runs_and_the_source_stands() {
    requires_kvm!();
    let mut source = dirty();
    let mut destination = waiting(MODE, json!({}));
    let (sent, received) = cut_at(Record::Running, &source, &destination);
    assert_eq!(sent.unwrap_err().kind, Kind::Disconnected);
    received.unwrap();
    let so_far = passes_so_far(&mut source);
    destination.until(&format!("pass {}\n", so_far + 2));
    assert_eq!(passes_so_far(&mut source), so_far);
    assert_eq!(
        source.must(Request::Stop).pop(),
        Some(Event::Ended {
            reason: EndReason::Stopped,
            detail: String::new(),
        })
    );
}

/// A generator of numbers (xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn a_bit_that_flips_anywhere_is_noticed_by_whoever_hears_it() {
    requires_kvm!();
    use Record::{Accepted, Facts, Last, Pages, Ready, Round, Zeros};
    let mut source = dirty();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for spoilt in [Facts, Pages, Zeros, Round, Last, Accepted, Ready] {
        let destination = waiting(MODE, json!({}));
        // Not in what says where the next record begins: that the other side would wait for.
        let place = random.below(1 << 32) as usize;
        let bit = 1 << random.below(8);
        let mut done = false;
        let (sent, received) = between(&source, &destination, move |_, _, header, body| {
            if kind(header) == spoilt && !done {
                done = true;
                let at = place % (HEADER - 4 + body.len());
                match at.checked_sub(HEADER - 4) {
                    Some(at) => body[at] ^= bit,
                    None if at < 8 => header[at] ^= bit,
                    None => header[at + 4] ^= bit,
                }
            }
            Fate::Pass
        });
        let sent = sent.unwrap_err();
        assert_eq!(sent.kind, Kind::ImageInvalid, "{spoilt:?}: {sent}");
        received.unwrap_err();
        assert_eq!(destination.end().0, EndReason::Error, "{spoilt:?}");
        goes_on(&mut source);
    }
}

#[test]
fn one_that_is_stopped_at_any_moment_runs_in_one_place() {
    requires_kvm!();
    let mut source = dirty();
    let mut before = 0;
    let mut away = 0;
    for seed in 1..=20u64 {
        let mut destination = waiting(MODE, json!({}));
        let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
        let when = random.below(30) as usize;
        let (tell, told) = std::sync::mpsc::channel();
        let (between, here, there) = Between::new(Box::new(move |way, number, _, _| {
            if way == Way::ToDestination && number == when {
                let _ = tell.send(());
            }
            Fate::Pass
        }));
        destination.begin_receive(there, false);
        source.begin_send(here);
        told.recv_timeout(PATIENCE).unwrap();
        source.machine.request(2000, Request::CancelSave);
        let sent = source.answer(SEND).0;
        let received = destination.answer(RECEIVE).0;
        drop(between);
        match sent {
            // It was too late.
            Ok(_) => {
                received.unwrap();
                before += passes_so_far(&mut source);
                assert_eq!(source.end().0, EndReason::Migrated);
                let text = destination.until("pass ");
                assert!(!text.contains("page"), "{text}");
                away += 1;
                // Its guest tells numbers that do not begin with 1.
                let mut fresh = dirty();
                std::mem::swap(&mut source, &mut fresh);
                drop(fresh);
            }
            Err(error) => {
                assert_eq!(error.kind, Kind::Cancelled, "seed {seed}: {error}");
                received.unwrap_err();
                assert_eq!(destination.end().0, EndReason::Error);
                goes_on(&mut source);
            }
        }
    }
    assert!(away < 20, "none was stopped, {before} passes");
}

#[test]
fn a_hostile_destination_keeps_nothing() {
    requires_kvm!();
    let mut source = dirty();
    let refused = |body: &[u8]| {
        let header = Header::of(Record::Refused, 0, (0, 0), body).bytes();
        [&header, body].concat()
    };
    let answers: Vec<(Vec<u8>, Kind)> = vec![
        (Vec::new(), Kind::Disconnected),
        (vec![0xff; 4096], Kind::ImageInvalid),
        (
            b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec(),
            Kind::ImageInvalid,
        ),
        (
            Header::of(Record::Running, 0, (0, 0), &[]).bytes().to_vec(),
            Kind::ImageInvalid,
        ),
        (
            Header::of(Record::Accepted, 1, (0, 0), &[])
                .bytes()
                .to_vec(),
            Kind::ImageInvalid,
        ),
        (refused(b"{"), Kind::ImageInvalid),
        (
            refused(br#"{"kind":"Nonsense","argument":"","message":"\u001b[2Jno"}"#),
            Kind::Internal,
        ),
    ];
    for (answer, wanted) in answers {
        let (here, mut there) = UnixStream::pair().unwrap();
        source.begin_send(here);
        let mut begin = [0; PREAMBLE];
        there.read_exact(&mut begin).unwrap();
        assert_eq!(begin, preamble(PLAIN));
        there.write_all(&answer).unwrap();
        there.shutdown(Shutdown::Write).unwrap();
        let error = source.answer(SEND).0.unwrap_err();
        assert_eq!(error.kind, wanted, "{error}");
        assert!(!error.message.contains('\u{1b}'), "{error}");
        goes_on(&mut source);
    }
}

#[test]
fn what_is_no_machine_ends_the_one_that_waits_for_it() {
    requires_kvm!();
    let facts = |body: &[u8]| {
        let header = Header::of(Record::Facts, 0, (0, 0), body).bytes();
        [&preamble(PLAIN)[..], &header, body].concat()
    };
    let mut newer = preamble(PLAIN);
    newer[8] = 9;
    for (bytes, wanted) in [
        (Vec::new(), Kind::Disconnected),
        (vec![0; 100], Kind::ImageInvalid),
        (newer.to_vec(), Kind::NotSupported),
        (preamble(PLAIN)[..9].to_vec(), Kind::Disconnected),
        (facts(b"{}"), Kind::ImageInvalid),
        (facts(b"[")[..40].to_vec(), Kind::Disconnected),
    ] {
        let destination = waiting(MODE, json!({}));
        let (mut here, there) = UnixStream::pair().unwrap();
        destination.begin_receive(there, false);
        here.write_all(&bytes).unwrap();
        here.shutdown(Shutdown::Write).unwrap();
        let (received, _) = destination.answer(RECEIVE);
        assert_eq!(received.unwrap_err().kind, wanted, "{bytes:?}");
        assert_eq!(destination.end().0, EndReason::Error);
    }
}

#[test]
fn what_is_no_connected_stream_socket_is_refused() {
    requires_kvm!();
    let mut source = dirty();
    let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for socket in [OwnedFd::from(datagrams), listener.into(), file.into()] {
        source.begin_send(socket);
        let error = source.answer(SEND).0.unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "socket")
        );
    }
    goes_on(&mut source);
}

#[test]
fn a_guest_that_dirties_more_than_goes_through_is_slowed_until_it_fits() {
    requires_kvm!();
    let mode = "dirty mib=1 beat=50";
    let mut source = run(mode, json!({}));
    source.until("pass 50\n");
    let mut destination = waiting(mode, json!({}));
    let (here, there) = UnixStream::pair().unwrap();
    destination.begin_receive(there, false);
    let bandwidth = 8 << 20;
    source.begin_send_at(here, 100, bandwidth);
    let sent = source.answer(SEND).0.unwrap();
    destination.answer(RECEIVE).0.unwrap();
    assert!(sent["rounds"].as_u64().unwrap() > 1, "{sent}");
    assert!(sent["slowed"].as_u64().unwrap() > 0, "{sent}");
    let throughput = sent["throughput"].as_u64().unwrap();
    assert!(throughput < bandwidth + bandwidth / 8, "{sent}");
    let text = source.drain() + &destination.until("0\n");
    assert!(!text.contains("page"), "{text}");
}

#[test]
fn a_guest_may_end_or_be_ended_reset_or_paused_while_its_memory_goes() {
    requires_kvm!();
    // Nobody reads: the rounds last until something happens.
    let stuck = |guest: &Running| {
        let (here, mut there) = UnixStream::pair().unwrap();
        guest.begin_send(here);
        let accepted = Header::of(Record::Accepted, 0, (0, 0), &[]).bytes();
        there.write_all(&accepted).unwrap();
        there
    };
    let mut guest = run("wait-power-button", json!({}));
    guest.until("waiting");
    let _there = stuck(&guest);
    guest.must(Request::PowerButton);
    assert_eq!(guest.answer(SEND).0.unwrap_err().kind, Kind::Cancelled);

    let mut guest = dirty();
    let there = stuck(&guest);
    guest.must(Request::Pause);
    guest.must(Request::Resume);
    assert_eq!(guest.must(Request::Reset), [Event::Reset]);
    assert_eq!(
        guest
            .ask(Request::MemoryTarget(1 << 20))
            .0
            .unwrap_err()
            .kind,
        Kind::InvalidState
    );
    drop(there);
    assert_eq!(guest.answer(SEND).0.unwrap_err().kind, Kind::Disconnected);
    guest.until("pass 2\n");
    let _there = stuck(&guest);
    guest.must(Request::Stop);
    assert_eq!(guest.answer(SEND).0.unwrap_err().kind, Kind::Cancelled);
}

/// Another open of a file, whose locks are its own.
pub(crate) fn opened(path: &Path) -> Value {
    let file = File::options().read(true).write(true).open(path).unwrap();
    json!({ "id": "root", "layers": [{ "fd": file.into_raw_fd(), "format": "raw" }] })
}

pub(crate) const WRITES: &str = "disk-loop sector=0 count=64 beat=50";

/// The numbers that such a guest has written.
pub(crate) fn written(path: &Path) -> Vec<u64> {
    let bytes = std::fs::read(path).unwrap();
    let sectors = bytes.chunks(512).take(64);
    let numbers = sectors.map(|sector| u64::from_le_bytes(sector[..8].try_into().unwrap()));
    numbers.collect()
}

fn newest(path: &Path) -> u64 {
    written(path).into_iter().max().unwrap()
}

#[test]
fn a_disk_goes_on_with_its_machine_which_never_both_have() {
    requires_kvm!();
    let directory = Directory::new("disk-migrated");
    let path = directory.0.join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut source = run(WRITES, json!({ "disks": [opened(&path)] }));
    source.until("loop: beat");
    // It is built while the source holds the disk's locks.
    let mut destination = waiting(WRITES, json!({ "disks": [opened(&path)] }));
    moved(&source, &destination);
    let before = newest(&path);
    drop(source);
    destination.until("loop: beat");
    destination.must(Request::Pause);
    let all = written(&path);
    let (low, high) = (all.iter().min().unwrap(), all.iter().max().unwrap());
    assert!(
        *high > before && high - low < 64,
        "none was left out: {all:?}"
    );
}

#[test]
fn a_destination_that_cannot_have_its_disk_gives_the_machine_back() {
    requires_kvm!();
    let directory = Directory::new("disk-held");
    let (path, copy) = (directory.0.join("disk"), directory.0.join("copy"));
    for path in [&path, &copy] {
        std::fs::write(path, vec![0; 1 << 20]).unwrap();
    }
    let mut source = run(WRITES, json!({ "disks": [opened(&path)] }));
    source.until("loop: beat");
    let mut holder = run(WRITES, json!({ "disks": [opened(&copy)] }));
    holder.until("loop: beat");
    let destination = waiting(WRITES, json!({ "disks": [opened(&copy)] }));
    let (here, there) = UnixStream::pair().unwrap();
    // Another file, which somebody says is right.
    let from = ReceiveFrom {
        fd: there.into_raw_fd(),
        paused: false,
        copy: Vec::new(),
        separate: vec!["disk/root".to_owned()],
    };
    destination.machine.receive(RECEIVE, &from).unwrap();
    source.begin_send(here);
    let (sent, events) = source.answer(SEND);
    let error = sent.unwrap_err();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::InUse, "disk/root")
    );
    assert_eq!(events, [Event::Paused, Event::Running]);
    assert_eq!(destination.answer(RECEIVE).0.unwrap_err().kind, Kind::InUse);
    assert_eq!(destination.end().0, EndReason::Error);
    let before = newest(&path);
    let begin = std::time::Instant::now();
    while newest(&path) < before + 100 {
        // A console that nobody reads holds the guest up.
        source.drain();
        assert!(begin.elapsed() < PATIENCE, "no writes after {before}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_machine_in_its_firmware_goes_with_what_that_shadows() {
    requires_seabios!();
    let directory = Directory::new("seabios-migrated");
    let disk = bootable(&directory.0, "booted", false);
    let path = directory.0.join("booted");
    let machine = |disk: Value| {
        let firmware = json!({ "code_fd": fd(SEABIOS), "boot": ["disk/booted"] });
        json!({ "kernel": null, "disks": [disk], "firmware": firmware })
    };
    // Its RAM below 1 MiB changes what it shows while the rounds run: SeaBIOS copies itself there, and closes it.
    let mut source = run("", machine(disk));
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let again =
        json!({ "id": "booted", "layers": [{ "fd": image.into_raw_fd(), "format": "raw" }] });
    let mut destination = waiting("", machine(again));
    moved(&source, &destination);
    assert!(!source.drain().contains("booted"), "it was too quick");
    destination.until("booted");
    assert_eq!(destination.end().0, EndReason::GuestPoweroff);
}

#[test]
fn memory_in_a_file_goes_without_its_holes() {
    requires_kvm!();
    let memory = || {
        // SAFETY: the name is a C string; the fd that comes back is ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
        file.set_len(64 << 20).unwrap();
        file
    };
    let (ours, theirs) = (memory(), memory());
    let config = |file: &File| {
        let fd = file.try_clone().unwrap().into_raw_fd();
        json!({ "memory_kind": "shareable", "memory_fd": fd })
    };
    let mut source = run(MODE, config(&ours));
    source.until("pass 2\n");
    let mut destination = waiting(MODE, config(&theirs));
    let sent = moved(&source, &destination);
    destination.until("pass ");
    assert!(sent["sent"].as_u64().unwrap() < 60 << 20, "{sent}");
    // Huge pages may be there where a few bytes were written.
    for file in [&ours, &theirs] {
        let used = file.metadata().unwrap().blocks() * 512;
        assert!(used < 32 << 20, "{used} bytes are there");
    }
}
