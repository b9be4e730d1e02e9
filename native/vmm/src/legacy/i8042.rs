// SPDX-License-Identifier: Apache-2.0
//! The keyboard controller (8042), with neither keyboard nor mouse.
//!
//! It answers its own commands, so that a driver that probes it is done at once, and pulses the reset line
//! at command 0xfe. Bytes for the devices behind it get no answer, as with nothing plugged in.
//! Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::cpu::gate::{Cause, Gate};
use crate::error::Result;
use crate::layout::{I8042_COMMAND, I8042_DATA};
use crate::state::{self, Stateful};

const STATUS_OUTPUT_FULL: u8 = 1;
/// The self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// The last byte written was a command.
const STATUS_COMMAND: u8 = 1 << 3;
/// The keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Translation on, system flag, both clocks disabled.
const CONFIGURATION: u8 = 0x74;

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Expects {
    Nothing,
    Configuration,
    OutputPort,
    /// A byte for a device that is not there.
    Ignored,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    configuration: u8,
    output: Option<u8>,
    expects: Expects,
    last_was_command: bool,
}

const RESET: State = State {
    configuration: CONFIGURATION,
    output: None,
    expects: Expects::Nothing,
    last_was_command: false,
};

/// The controller.
pub struct I8042 {
    state: Mutex<State>,
    gate: Arc<Gate>,
}

impl I8042 {
    /// A controller that resets the machine through `gate`.
    pub fn new(gate: Arc<Gate>) -> I8042 {
        I8042 {
            state: Mutex::new(RESET),
            gate,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        *self.lock() = RESET;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn command(&self, command: u8) {
        let mut state = self.lock();
        state.last_was_command = true;
        state.expects = Expects::Nothing;
        match command {
            0x20 => state.output = Some(state.configuration),
            0x60 => state.expects = Expects::Configuration,
            0xa7 => state.configuration |= 0x20,
            0xa8 => state.configuration &= !0x20,
            // Interface tests of mouse and keyboard: no error.
            0xa9 | 0xab => state.output = Some(0),
            0xaa => state.output = Some(0x55),
            0xad => state.configuration |= 0x10,
            0xae => state.configuration &= !0x10,
            // The output port: not in reset, A20 open.
            0xd0 => state.output = Some(0b11),
            0xd1 => state.expects = Expects::OutputPort,
            0xd2..=0xd4 => state.expects = Expects::Ignored,
            // Pulse output lines low: line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => {
                drop(state);
                self.gate.raise(Cause::Reset("keyboard controller"));
            }
            _ => {}
        }
    }

    fn data(&self, byte: u8) {
        let mut state = self.lock();
        state.last_was_command = false;
        match std::mem::replace(&mut state.expects, Expects::Nothing) {
            Expects::Configuration => state.configuration = byte,
            Expects::OutputPort if byte & 1 == 0 => {
                drop(state);
                self.gate.raise(Cause::Reset("keyboard controller"));
            }
            _ => {}
        }
    }
}

impl Stateful for I8042 {
    fn save(&self) -> Result<state::State> {
        state::write(&*self.lock())
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        *self.lock() = state::read(state)?;
        Ok(())
    }
}

impl BusDevice for I8042 {
    fn read(&self, base: u64, _offset: u64, data: &mut [u8]) {
        let [byte] = data else { return };
        let mut state = self.lock();
        match base {
            I8042_DATA => *byte = state.output.take().unwrap_or(0),
            _ => {
                *byte = STATUS_SYSTEM | STATUS_UNLOCKED;
                if state.output.is_some() {
                    *byte |= STATUS_OUTPUT_FULL;
                }
                if state.last_was_command {
                    *byte |= STATUS_COMMAND;
                }
            }
        }
    }

    fn write(&self, base: u64, _offset: u64, data: &[u8]) {
        let [byte] = data else { return };
        match base {
            I8042_COMMAND => self.command(*byte),
            _ => self.data(*byte),
        }
    }
}
