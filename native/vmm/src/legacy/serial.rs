// SPDX-License-Identifier: Apache-2.0
//! The first serial port: a 16550A whose other end is a non-blocking stream socket.
//!
//! Nothing is ever lost and nobody ever waits. Output goes to the socket at once; when the socket is full,
//! bytes stay in the transmit FIFO and LSR.THRE stays clear until the socket takes them, so the *guest* waits.
//! Input stays in the socket until the receive FIFO has room and the guest looks: it reads LSR or has the receive
//! interrupt on. So what was typed before a driver clears the FIFOs is still there afterwards.
//!
//! Two parties move bytes: a vCPU thread within a register access, and the control thread when epoll says
//! (edge-triggered) that the socket became readable or writable. Every time room appears on either side somebody tries
//! the socket until it says EAGAIN, and epoll then reports the next change: no wake-up is lost.
//! A reader that went away (EPIPE) takes everything.
//!
//! Source: National Semiconductor PC16550D data sheet. Modem lines are those of a connected null modem.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::Line;
use crate::state::{self, Bytes, Stateful};

const FIFO: usize = 16;

const IER_RX: u8 = 1;
const IER_TX: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;

const IIR_NONE: u8 = 0b0001;
const IIR_TX: u8 = 0b0010;
const IIR_RX: u8 = 0b0100;
const IIR_TIMEOUT: u8 = 0b1100;
const IIR_LINE: u8 = 0b0110;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 1 << 1;
const FCR_CLEAR_TX: u8 = 1 << 2;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_THRE: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

#[derive(Default)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    /// "Transmitter empty" has yet to be told: set when the FIFO empties, cleared by reading IIR.
    tx_pending: bool,
    rx: VecDeque<u8>,
    tx: VecDeque<u8>,
    /// The other end of the socket is gone.
    closed: bool,
    /// epoll said that the socket is readable, and nobody has read it dry since.
    input_waits: bool,
    written: u64,
    read: u64,
}

/// The port.
pub struct Serial {
    state: Mutex<State>,
    socket: OwnedFd,
    line: Line,
}

impl Serial {
    /// A port on `socket` (non-blocking, SOCK_STREAM) that interrupts through `line`.
    pub fn new(socket: OwnedFd, line: Line) -> Serial {
        Serial {
            state: Mutex::new(reset_state()),
            socket,
            line,
        }
    }

    /// For epoll: edge-triggered, readable and writable.
    pub fn socket(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The socket became readable or writable.
    pub fn socket_ready(&self) {
        let mut state = self.lock();
        self.transmit(&mut state);
        state.input_waits = true;
        if state.ier & IER_RX != 0 {
            self.receive(&mut state);
        }
        self.update(&state);
    }

    /// Back to the state after power-on; output that waits is not lost.
    pub fn reset(&self) {
        let mut state = self.lock();
        let before = std::mem::replace(&mut *state, reset_state());
        state.tx = before.tx;
        state.closed = before.closed;
        // Whether there is input, the first look at LSR will show.
        state.input_waits = true;
        (state.written, state.read) = (before.written, before.read);
        self.update(&state);
    }

    /// Bytes written to and read from the socket.
    pub fn stats(&self) -> (u64, u64) {
        let state = self.lock();
        (state.written, state.read)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Hands the transmit FIFO to the socket as far as it takes it.
    fn transmit(&self, state: &mut State) {
        if state.tx.is_empty() {
            return;
        }
        while !state.tx.is_empty() {
            let (bytes, _) = state.tx.as_slices();
            match send(self.socket(), bytes) {
                Ok(sent) => {
                    state.written = state.written.saturating_add(sent as u64);
                    state.tx.drain(..sent.min(state.tx.len()));
                }
                Err(libc::EAGAIN) => return,
                Err(libc::EINTR) => {}
                Err(_) => {
                    state.closed = true;
                    state.tx.clear();
                }
            }
        }
        state.tx_pending = true;
    }

    /// Fills the receive FIFO from the socket.
    fn receive(&self, state: &mut State) {
        while state.rx.len() < FIFO && state.mcr & MCR_LOOP == 0 {
            let mut bytes = [0; FIFO];
            let Some(room) = bytes.get_mut(..FIFO.saturating_sub(state.rx.len())) else {
                return;
            };
            match receive(self.socket(), room) {
                Ok(len @ 1..) => {
                    state.read = state.read.saturating_add(len as u64);
                    state.rx.extend(bytes.iter().take(len));
                }
                Err(libc::EINTR) => {}
                Ok(0) | Err(_) => {
                    state.input_waits = false;
                    return;
                }
            }
        }
    }

    fn update(&self, state: &State) {
        self.line
            .set(state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && identify(state) != IIR_NONE);
    }

    fn read_register(&self, offset: u64) -> u8 {
        let mut state = self.lock();
        let divisor = state.lcr & LCR_DLAB != 0;
        let value = match offset {
            0 if divisor => state.divisor as u8,
            1 if divisor => (state.divisor >> 8) as u8,
            0 => {
                let byte = state.rx.pop_front().unwrap_or(0);
                if state.rx.is_empty() {
                    self.receive(&mut state);
                }
                byte
            }
            1 => state.ier,
            2 => {
                let cause = identify(&state);
                if cause == IIR_TX {
                    state.tx_pending = false;
                }
                let fifo = if state.fcr & FCR_ENABLE != 0 {
                    IIR_FIFO
                } else {
                    0
                };
                cause | fifo
            }
            3 => state.lcr,
            4 => state.mcr,
            5 => {
                if state.input_waits && state.rx.is_empty() {
                    self.receive(&mut state);
                }
                let mut status = 0;
                if !state.rx.is_empty() {
                    status |= LSR_DATA;
                }
                if std::mem::take(&mut state.overrun) {
                    status |= LSR_OVERRUN;
                }
                if state.tx.is_empty() {
                    status |= LSR_THRE | LSR_IDLE;
                }
                status
            }
            6 => modem_status(state.mcr),
            _ => state.scratch,
        };
        self.update(&state);
        value
    }

    fn write_register(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        let divisor = state.lcr & LCR_DLAB != 0;
        match offset {
            0 if divisor => state.divisor = state.divisor & 0xff00 | u16::from(value),
            1 if divisor => state.divisor = state.divisor & 0x00ff | u16::from(value) << 8,
            0 if state.mcr & MCR_LOOP != 0 => {
                if state.rx.len() < FIFO {
                    state.rx.push_back(value);
                } else {
                    state.overrun = true;
                }
                state.tx_pending = true;
            }
            0 => {
                // A guest that does not look at THRE loses what it writes into a full FIFO, as on the real thing.
                if state.tx.len() < FIFO && !state.closed {
                    state.tx.push_back(value);
                }
                state.tx_pending = false;
                self.transmit(&mut state);
                if state.closed {
                    state.tx_pending = true;
                }
            }
            1 => {
                // Enabling the interrupt while the transmitter is empty raises it.
                if value & IER_TX != 0 && state.ier & IER_TX == 0 && state.tx.is_empty() {
                    state.tx_pending = true;
                }
                state.ier = value & 0x0f;
                if state.ier & IER_RX != 0 && state.input_waits {
                    self.receive(&mut state);
                }
            }
            2 => {
                if value & FCR_CLEAR_RX != 0 || (value ^ state.fcr) & FCR_ENABLE != 0 {
                    state.rx.clear();
                    if state.ier & IER_RX != 0 {
                        self.receive(&mut state);
                    }
                }
                if value & FCR_CLEAR_TX != 0 {
                    state.tx.clear();
                    state.tx_pending = true;
                }
                state.fcr = value & !(FCR_CLEAR_RX | FCR_CLEAR_TX);
            }
            3 => state.lcr = value,
            4 => {
                state.mcr = value & 0x1f;
                if state.ier & IER_RX != 0 && state.input_waits {
                    self.receive(&mut state);
                }
            }
            7 => state.scratch = value,
            _ => {}
        }
        self.update(&state);
    }
}

/// What waits in the socket is the host's; what is in the FIFOs the guest's.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    tx_pending: bool,
    rx: Bytes,
    tx: Bytes,
}

impl Stateful for Serial {
    fn save(&self) -> crate::error::Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            scratch: state.scratch,
            divisor: state.divisor,
            overrun: state.overrun,
            tx_pending: state.tx_pending,
            rx: Bytes(state.rx.iter().copied().collect()),
            tx: Bytes(state.tx.iter().copied().collect()),
        })
    }

    fn restore(&self, state: &state::State) -> crate::error::Result<()> {
        let saved: Saved = state::read(state)?;
        if saved.rx.0.len() > FIFO || saved.tx.0.len() > FIFO {
            return Err(state::invalid("more bytes than a FIFO holds"));
        }
        let mut state = self.lock();
        *state = State {
            ier: saved.ier & 0x0f,
            fcr: saved.fcr & !(FCR_CLEAR_RX | FCR_CLEAR_TX),
            lcr: saved.lcr,
            mcr: saved.mcr & 0x1f,
            scratch: saved.scratch,
            divisor: saved.divisor,
            overrun: saved.overrun,
            tx_pending: saved.tx_pending,
            rx: saved.rx.0.into(),
            tx: saved.tx.0.into(),
            closed: state.closed,
            input_waits: true,
            written: state.written,
            read: state.read,
        };
        self.transmit(&mut state);
        if state.ier & IER_RX != 0 {
            self.receive(&mut state);
        }
        self.update(&state);
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.read_register(offset);
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            self.write_register(offset, *byte);
        }
    }
}

fn reset_state() -> State {
    State {
        divisor: 12, // 9600 baud
        tx_pending: true,
        ..Default::default()
    }
}

/// The most urgent interrupt cause (data sheet, table III).
fn identify(state: &State) -> u8 {
    // FCR's two top bits: interrupt at 1, 4, 8 or 14 bytes; fewer are told by the timeout at once.
    let trigger = match (state.fcr & FCR_ENABLE != 0, state.fcr >> 6) {
        (true, 1) => 4,
        (true, 2) => 8,
        (true, 3) => 14,
        _ => 1,
    };
    if state.ier & IER_LINE != 0 && state.overrun {
        IIR_LINE
    } else if state.ier & IER_RX != 0 && state.rx.len() >= trigger {
        IIR_RX
    } else if state.ier & IER_RX != 0 && !state.rx.is_empty() {
        IIR_TIMEOUT
    } else if state.ier & IER_TX != 0 && state.tx_pending && state.tx.is_empty() {
        IIR_TX
    } else {
        IIR_NONE
    }
}

fn modem_status(mcr: u8) -> u8 {
    if mcr & MCR_LOOP == 0 {
        return MSR_DCD | MSR_DSR | MSR_CTS;
    }
    let mut status = 0;
    for (output, input) in [
        (MCR_RTS, MSR_CTS),
        (MCR_DTR, MSR_DSR),
        (MCR_OUT1, MSR_RI),
        (MCR_OUT2, MSR_DCD),
    ] {
        if mcr & output != 0 {
            status |= input;
        }
    }
    status
}

fn send(socket: RawFd, bytes: &[u8]) -> Result<usize, libc::c_int> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are a slice's.
    let sent = unsafe { libc::send(socket, bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| errno())
}

fn receive(socket: RawFd, room: &mut [u8]) -> Result<usize, libc::c_int> {
    // SAFETY: the pointer and the length are a slice's.
    let received = unsafe {
        libc::recv(
            socket,
            room.as_mut_ptr().cast(),
            room.len(),
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(received).map_err(|_| errno())
}

fn errno() -> libc::c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::Arc;

    use super::*;

    fn port() -> (Serial, UnixStream, Arc<AtomicBool>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let level = Arc::new(AtomicBool::new(false));
        let seen = level.clone();
        let line = Line::with(move |level| seen.store(level, Ordering::SeqCst));
        (Serial::new(ours.into(), line), theirs, level)
    }

    fn lsr(serial: &Serial) -> u8 {
        serial.read_register(5)
    }

    #[test]
    fn a_full_socket_makes_the_guest_wait_and_loses_nothing() {
        let (serial, mut theirs, _) = port();
        let mut sent: Vec<u8> = Vec::new();
        while lsr(&serial) & LSR_THRE != 0 {
            let byte = (sent.len() % 251) as u8;
            serial.write_register(0, byte);
            sent.push(byte);
            assert!(sent.len() < 10_000_000, "the socket never fills");
        }
        theirs.set_nonblocking(true).unwrap();
        let mut got = Vec::new();
        while got.len() < sent.len() {
            let mut buffer = [0; 4096];
            match theirs.read(&mut buffer) {
                Ok(len) => got.extend_from_slice(&buffer[..len]),
                Err(_) => serial.socket_ready(),
            }
        }
        assert_eq!(got, sent);
        assert_ne!(lsr(&serial) & LSR_THRE, 0);
    }

    #[test]
    fn input_waits_in_the_socket_until_the_fifo_has_room() {
        let (serial, mut theirs, level) = port();
        serial.write_register(4, MCR_OUT2);
        serial.write_register(1, IER_RX);
        let text: Vec<u8> = (0..100).collect();
        theirs.write_all(&text).unwrap();
        serial.socket_ready();
        let mut got = Vec::new();
        while lsr(&serial) & LSR_DATA != 0 {
            assert!(
                level.load(Ordering::SeqCst),
                "no interrupt at byte {}",
                got.len()
            );
            got.push(serial.read_register(0));
        }
        assert_eq!(got, text);
        assert!(!level.load(Ordering::SeqCst));
    }

    #[test]
    fn what_was_typed_before_the_driver_came_is_kept() {
        let (serial, mut theirs, _) = port();
        theirs.write_all(b"hi").unwrap();
        serial.socket_ready();
        serial.write_register(2, FCR_ENABLE | FCR_CLEAR_RX | FCR_CLEAR_TX);
        assert_ne!(lsr(&serial) & LSR_DATA, 0);
        assert_eq!([serial.read_register(0), serial.read_register(0)], *b"hi");
        assert_eq!(lsr(&serial) & LSR_DATA, 0);
    }

    #[test]
    fn the_transmitter_interrupts_once_when_it_empties() {
        let (serial, _theirs, level) = port();
        serial.write_register(4, MCR_OUT2);
        serial.write_register(1, IER_TX);
        assert!(level.load(Ordering::SeqCst));
        assert_eq!(serial.read_register(2) & 0xf, IIR_TX);
        assert!(!level.load(Ordering::SeqCst), "reading IIR takes it back");
        serial.write_register(0, b'x');
        assert!(
            level.load(Ordering::SeqCst),
            "and the next byte raises it again"
        );
    }

    #[test]
    fn a_reader_that_went_away_takes_everything() {
        let (serial, theirs, _) = port();
        drop(theirs);
        for _ in 0..100 {
            serial.write_register(0, b'x');
            assert_ne!(lsr(&serial) & LSR_THRE, 0);
        }
    }

    #[test]
    fn loopback_is_what_linux_probes_for() {
        let (serial, _theirs, _) = port();
        serial.write_register(4, MCR_LOOP | MCR_OUT2 | MCR_RTS);
        assert_eq!(serial.read_register(6) & 0xf0, MSR_DCD | MSR_CTS);
        serial.write_register(0, 0x5a);
        assert_eq!(serial.read_register(0), 0x5a);
    }

    #[test]
    fn what_waits_in_the_fifos_goes_on_in_another_port() {
        let (serial, mut theirs, _) = port();
        theirs.write_all(b"keys").unwrap();
        serial.write_register(4, MCR_OUT2);
        serial.write_register(1, IER_RX);
        serial.socket_ready();
        serial.read_register(0);
        let (other, _theirs, level) = port();
        other.restore(&serial.save().unwrap()).unwrap();
        assert!(level.load(Ordering::SeqCst), "the line is as it was");
        let keys = [other.read_register(0), other.read_register(0)];
        assert_eq!(keys, *b"ey");
        let mut state = serial.save().unwrap();
        state["rx"] = "00".repeat(FIFO + 1).into();
        assert!(other.restore(&state).is_err());
    }
}
