// SPDX-License-Identifier: Apache-2.0
//! Why a command was not carried out: sense key, additional code and qualifier (SPC-4, 4.5), in fixed format.

use serde::{Deserialize, Serialize};

/// Bytes of sense data in fixed format.
pub const LEN: usize = 18;

/// A reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sense {
    key: u8,
    code: u8,
    qualifier: u8,
}

impl Sense {
    /// Nothing to tell.
    pub const NONE: Sense = Sense::new(0, 0, 0);
    /// There is no medium.
    pub const NO_MEDIUM: Sense = Sense::new(2, 0x3a, 0);
    /// There is none, as the tray is open.
    pub const TRAY_OPEN: Sense = Sense::new(2, 0x3a, 2);
    /// The host could not read.
    pub const UNREADABLE: Sense = Sense::new(3, 0x11, 0);
    /// The host could not write.
    pub const UNWRITABLE: Sense = Sense::new(3, 0x0c, 0);
    /// No such command.
    pub const UNKNOWN_COMMAND: Sense = Sense::new(5, 0x20, 0);
    /// It leads behind the end.
    pub const OUT_OF_RANGE: Sense = Sense::new(5, 0x21, 0);
    /// A field of the command is wrong.
    pub const BAD_FIELD: Sense = Sense::new(5, 0x24, 0);
    /// No such unit.
    pub const NO_UNIT: Sense = Sense::new(5, 0x25, 0);
    /// A field of its parameters is wrong.
    pub const BAD_PARAMETER: Sense = Sense::new(5, 0x26, 0);
    /// It has not the parameters that belong to it.
    pub const SHORT_PARAMETERS: Sense = Sense::new(5, 0x1a, 0);
    /// The guest has forbidden it.
    pub const LOCKED: Sense = Sense::new(5, 0x53, 2);
    /// The medium has changed.
    pub const MEDIUM_CHANGED: Sense = Sense::new(6, 0x28, 0);
    /// The unit was reset.
    pub const RESET: Sense = Sense::new(6, 0x29, 3);
    /// It has another size.
    pub const CAPACITY_CHANGED: Sense = Sense::new(6, 0x2a, 9);
    /// It must not be written.
    pub const PROTECTED: Sense = Sense::new(7, 0x27, 0);

    const fn new(key: u8, code: u8, qualifier: u8) -> Sense {
        Sense {
            key,
            code,
            qualifier,
        }
    }

    /// As the guest reads it.
    pub fn bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = LEN as u8 - 8;
        bytes[12] = self.code;
        bytes[13] = self.qualifier;
        bytes
    }

    /// Code and qualifier, as an event tells them (virtio 1.2, 5.6.6.3).
    pub fn reason(self) -> u32 {
        u32::from(self.code) | u32::from(self.qualifier) << 8
    }
}
