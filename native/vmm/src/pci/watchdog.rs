// SPDX-License-Identifier: Apache-2.0
//! A watchdog: the timer of Intel's 6300ESB ("Intel 6300ESB I/O Controller Hub", 300641-004, chapter 16), which systems
//! know. A guest that sets it and then does not set it again in time is taken for stuck; what happens to it is the
//! definition's.
//!
//! | register | where | what |
//! |---|---|---|
//! | 0x60, 2 bytes | configuration | bit 2: a tick is 0.96 µs, not 0.98 ms; bit 5: nothing happens at the end |
//! | 0x68, 1 byte | configuration | bit 1: enabled; bit 0: this register stays as it is until a reset |
//! | 0x00, 0x04 | BAR 0 | ticks of the two stages, 20 bits each |
//! | 0x0c | BAR 0 | 0x80, then 0x86, opens one write; bit 8 begins anew, bit 9 forgets that it has ended |
//!
//! The stages run one after the other. The first one's interrupt is not there: drivers switch it off. The time stands still
//! while the machine does. A timer of the kernel's, armed by vCPUs, wakes the control thread.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::{touches, ConfigSpace, Identity, BAR0, MULTIFUNCTION};
use super::{Function, Place, Window};
use crate::device::Device;
use crate::error::Result;
use crate::state::{self, Bytes, Stateful};
use crate::timer::Timer;

const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
const FAST: u8 = 1 << 2;
const HARMLESS: u8 = 1 << 5;
const LOCKED: u8 = 1 << 0;
const ENABLED: u8 = 1 << 1;
const RELOAD: u64 = 0x0c;
const BEGIN: u16 = 1 << 8;
const ENDED: u16 = 1 << 9;
const TICKS_MASK: u32 = 0xf_ffff;
const SIZE: u64 = 16;
/// Nanoseconds of a tick: 32,768 or 32 cycles of a 33 MHz clock.
const TICK: u64 = 983_040;
/// Between two ends that anybody hears of.
const PAUSE: Duration = Duration::from_secs(1);
const FAST_TICK: u64 = 960;

struct State {
    space: ConfigSpace,
    stages: [u32; 2],
    /// How much of the sequence that opens a write has come.
    opened: u8,
    /// It ended, and nobody has looked since.
    ended: bool,
    /// When it ends, while it runs.
    deadline: Option<Instant>,
    /// What was left when the machine stood still.
    left: Option<Duration>,
    /// When it was last told of.
    told: Option<Instant>,
}

/// The device.
pub struct Watchdog {
    state: Mutex<State>,
    timer: Timer,
}

impl Watchdog {
    /// One that nobody has set.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no timer.
    pub fn new() -> Result<Watchdog> {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x25ab,
            revision: 1,
            class: 0x088000,
            header: MULTIFUNCTION,
            subsystem: (0x1af4, 0x1100),
        });
        space.put(BAR0, &(Place::WATCHDOG.bar_address() as u32).to_le_bytes());
        space.allow(BAR0, &(!(SIZE as u32 - 1)).to_le_bytes());
        space.allow(CONFIG, &[0x27, 0]);
        space.allow(LOCK, &[0x07]);
        space.seal();
        Ok(Watchdog {
            state: Mutex::new(State {
                space,
                stages: [TICKS_MASK; 2],
                opened: 0,
                ended: false,
                deadline: None,
                left: None,
                told: None,
            }),
            timer: Timer::new()?,
        })
    }

    /// Readable when [`Watchdog::has_ended`] is to be asked.
    pub fn timer(&self) -> RawFd {
        self.timer.fd()
    }

    /// The timer is readable: whether the guest has let its time pass, and something is to happen.
    pub fn has_ended(&self) -> bool {
        self.timer.note();
        let mut state = self.lock();
        let now = Instant::now();
        if state.deadline.is_none_or(|deadline| now < deadline) {
            return false;
        }
        state.deadline = None;
        if state.space.u8(CONFIG) & HARMLESS != 0 {
            return false;
        }
        state.ended = true;
        // A guest that plays with it is not passed on more often than once a second.
        let fresh = state
            .told
            .is_none_or(|told| now.duration_since(told) >= PAUSE);
        if fresh {
            state.told = Some(now);
        }
        fresh
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Arms the kernel's timer for the deadline, or disarms it.
    fn arm(&self, state: &State) {
        let left = state
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.timer.arm(left);
    }
}

impl State {
    fn is_enabled(&self) -> bool {
        self.space.u8(LOCK) & ENABLED != 0
    }

    fn begin(&mut self) {
        let tick = match self.space.u8(CONFIG) & FAST {
            0 => TICK,
            _ => FAST_TICK,
        };
        let ticks: u64 = self.stages.iter().map(|stage| u64::from(*stage)).sum();
        let time = Duration::from_nanos(ticks.saturating_mul(tick));
        self.deadline = Instant::now()
            .checked_add(time)
            .filter(|_| self.is_enabled());
        self.left = None;
    }

    fn base(&self) -> u64 {
        u64::from(self.space.u32(BAR0) & !(SIZE as u32 - 1))
    }

    /// A write to the register that opens and begins.
    fn reload(&mut self, value: u16) {
        self.opened = match (value, self.opened) {
            (0x80, _) => 1,
            (0x86, 1) => 2,
            (value, 2) => {
                if value & BEGIN != 0 {
                    self.begin();
                }
                if value & ENDED != 0 {
                    self.ended = false;
                }
                0
            }
            _ => 0,
        };
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0 => self.stages[0],
            4 => self.stages[1],
            RELOAD if self.ended => u32::from(ENDED),
            _ => 0,
        }
    }
}

impl Function for Watchdog {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.lock().space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        let mut state = self.lock();
        let lock = touches(register, data.len(), LOCK, 1);
        if lock && state.space.u8(LOCK) & LOCKED != 0 {
            return false;
        }
        let before = state.is_enabled();
        state.space.write(register, data);
        if lock && before != state.is_enabled() {
            state.begin();
            self.arm(&state);
        }
        touches(register, data.len(), BAR0, 4) || touches(register, data.len(), 4, 2)
    }

    fn windows(&self) -> Vec<Window> {
        let state = self.lock();
        let window = Window {
            bar: 0,
            base: state.base(),
            size: SIZE,
        };
        let enabled = state.space.memory_enabled();
        enabled.then_some(window).into_iter().collect()
    }

    fn read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let value = self.lock().register(offset & !3).to_le_bytes();
        let from = value.iter().skip((offset & 3) as usize);
        for (byte, value) in data.iter_mut().zip(from.chain(std::iter::repeat(&0))) {
            *byte = *value;
        }
    }

    fn write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u32::from_le_bytes(bytes);
        match (offset, data.len()) {
            (RELOAD, 2 | 4) => {
                state.reload(value as u16);
                self.arm(&state);
            }
            (0, 4) if state.opened == 2 => {
                state.stages[0] = value & TICKS_MASK;
                state.opened = 0;
            }
            (4, 4) if state.opened == 2 => {
                state.stages[1] = value & TICKS_MASK;
                state.opened = 0;
            }
            _ => state.opened = 0,
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.space.reset();
        state.stages = [TICKS_MASK; 2];
        state.opened = 0;
        state.deadline = None;
        state.left = None;
        self.arm(&state);
    }
}

impl Device for Watchdog {
    fn id(&self) -> String {
        "watchdog".to_owned()
    }

    fn pause(&self) -> Result<()> {
        let mut state = self.lock();
        if let Some(deadline) = state.deadline.take() {
            state.left = Some(deadline.saturating_duration_since(Instant::now()));
        }
        self.arm(&state);
        Ok(())
    }

    fn resume(&self) {
        let mut state = self.lock();
        if let Some(left) = state.left.take() {
            state.deadline = Instant::now().checked_add(left);
        }
        self.arm(&state);
    }

    fn stats(&self) -> serde_json::Value {
        let state = self.lock();
        serde_json::json!({ "enabled": state.is_enabled(), "ended": state.ended })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    space: Bytes,
    stages: [u32; 2],
    opened: u8,
    ended: bool,
    /// Nanoseconds, while it runs.
    left: Option<u64>,
}

impl Stateful for Watchdog {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        let left = match state.deadline {
            Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
            None => state.left,
        };
        state::write(&Saved {
            space: state.space.saved(),
            stages: state.stages,
            opened: state.opened,
            ended: state.ended,
            left: left.map(|left| u64::try_from(left.as_nanos()).unwrap_or(u64::MAX)),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut state = self.lock();
        state.space.take(&saved.space)?;
        state.stages = saved.stages.map(|stage| stage & TICKS_MASK);
        state.opened = saved.opened.min(2);
        state.ended = saved.ended;
        state.deadline = None;
        // No more than the stages could have.
        let most = Duration::from_nanos(2 * u64::from(TICKS_MASK) * TICK);
        let left = saved
            .left
            .map(Duration::from_nanos)
            .map(|left| left.min(most));
        state.left = left.filter(|_| state.is_enabled());
        self.arm(&state);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(watchdog: &Watchdog, register: u64, value: u32) {
        for open in [0x80u16, 0x86] {
            watchdog.write(0, RELOAD, &open.to_le_bytes());
        }
        match register {
            RELOAD => watchdog.write(0, RELOAD, &(value as u16).to_le_bytes()),
            _ => watchdog.write(0, register, &value.to_le_bytes()),
        }
    }

    fn get(watchdog: &Watchdog, register: u64) -> u32 {
        let mut data = [0; 4];
        watchdog.read(0, register, &mut data);
        u32::from_le_bytes(data)
    }

    /// As Linux's driver begins: quick ticks, two stages of so many, enabled.
    fn started(ticks: u32) -> Watchdog {
        let watchdog = Watchdog::new().unwrap();
        watchdog.config_write(CONFIG, &[0x03 | FAST, 0]);
        put(&watchdog, 0, ticks);
        put(&watchdog, 4, ticks);
        put(&watchdog, RELOAD, u32::from(BEGIN));
        watchdog.config_write(LOCK, &[ENABLED]);
        watchdog
    }

    fn ends_within(watchdog: &Watchdog, time: Duration) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < time {
            if watchdog.has_ended() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    const SOON: Duration = Duration::from_secs(10);
    const WHILE: Duration = Duration::from_millis(60);

    #[test]
    fn it_ends_when_nobody_sets_it_and_says_so_afterwards() {
        let watchdog = started(10_000);
        assert!(ends_within(&watchdog, SOON));
        assert!(!watchdog.has_ended(), "once");
        Function::reset(&watchdog);
        assert_eq!(get(&watchdog, RELOAD), u32::from(ENDED));
        put(&watchdog, RELOAD, u32::from(ENDED));
        assert_eq!(get(&watchdog, RELOAD), 0);
        assert!(!ends_within(&watchdog, WHILE), "it is off");
    }

    #[test]
    fn it_does_not_end_while_it_is_set_again_or_off_or_harmless() {
        let watchdog = started(100_000);
        for _ in 0..6 {
            put(&watchdog, RELOAD, u32::from(BEGIN));
            assert!(!ends_within(&watchdog, WHILE));
        }
        watchdog.config_write(LOCK, &[0]);
        assert!(!ends_within(&watchdog, 4 * WHILE));
        let harmless = started(10_000);
        harmless.config_write(CONFIG, &[0x03 | FAST | HARMLESS, 0]);
        assert!(!ends_within(&harmless, 2 * WHILE));
    }

    #[test]
    fn one_that_is_locked_stays_on_until_a_reset() {
        let watchdog = started(10_000);
        watchdog.config_write(LOCK, &[ENABLED | LOCKED]);
        watchdog.config_write(LOCK, &[0]);
        assert!(ends_within(&watchdog, SOON));
        Function::reset(&watchdog);
        assert!(!ends_within(&watchdog, WHILE));
    }

    #[test]
    fn a_write_needs_its_sequence() {
        let watchdog = started(100);
        watchdog.config_write(LOCK, &[0]);
        watchdog.write(0, 0, &7u32.to_le_bytes());
        assert_eq!(get(&watchdog, 0), 100);
        watchdog.write(0, RELOAD, &0x86u16.to_le_bytes());
        watchdog.write(0, 0, &7u32.to_le_bytes());
        assert_eq!(get(&watchdog, 0), 100);
        put(&watchdog, 0, u32::MAX);
        assert_eq!(get(&watchdog, 0), TICKS_MASK);
        watchdog.write(0, 4, &7u32.to_le_bytes());
        assert_eq!(get(&watchdog, 4), 100, "one write each");
    }

    #[test]
    fn time_stands_still_while_the_machine_does_and_goes_on_elsewhere() {
        let watchdog = started(20_000);
        watchdog.pause().unwrap();
        assert!(!ends_within(&watchdog, 2 * WHILE));
        let other = Watchdog::new().unwrap();
        other.restore(&watchdog.save().unwrap()).unwrap();
        assert!(!ends_within(&other, 2 * WHILE));
        watchdog.resume();
        assert!(ends_within(&watchdog, SOON));
        other.resume();
        assert!(ends_within(&other, SOON));
        assert!(other.restore(&state::State::Null).is_err());
    }
}
