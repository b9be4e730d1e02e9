// SPDX-License-Identifier: Apache-2.0
//! What each part of a machine remembers, so that it can be written down and go on elsewhere.
//!
//! A part's state is JSON: it names its fields, so a later version can read it, and a parser that knows nothing of
//! the machine can take it apart without harm. Bytes are hex ([`Bytes`]). [`crate::save`] has the file that the states
//! go into, and the order in which they are restored.
//!
//! # What a new device has to do
//!
//! | it is | then |
//! |---|---|
//! | a virtio device | its registers, rings, vectors and PCI function are saved by [`crate::virtio::pci`]. What its thread knows beyond that (not counters, not what lies behind the device) goes into the answer to `Command::Save`, and comes back as [`crate::virtio::Activation::restored`]; a thread that cannot read it begins as if its driver had just become ready. |
//! | one with a configuration that changes | its [`crate::virtio::LiveConfig`] is `Stateful`, too: what the guest reads there, and the generation |
//! | another PCI function | [`crate::pci::Function`] demands `Stateful`: [`crate::pci::config::ConfigSpace`], [`crate::pci::msix::Msix`] and what it has besides |
//! | something at a port or an address | `Stateful`, and a line in `Platform::parts` |
//! | one that interrupts by a [`crate::irq::Line`] | `restore` drives the line as the state says: the interrupt controllers were restored before |
//!
//! What is saved is what the *guest* could tell: never a descriptor, an address of this process, a counter of statistics, a time of
//! the host. `save` is called while vCPUs and devices stand still, and changes nothing. `restore` is called once, on
//! a part as it was built, with state that may have been made by anybody: it says what does not fit, it never panics, and
//! what it takes over is no more than a guest could have set by itself. A field that is added later has a default that
//! means what its absence meant; a field is never given another meaning. State that a part does not know is refused.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Kind, Result};

/// The state of one part.
pub type State = serde_json::Value;

/// A part that remembers.
pub trait Stateful {
    /// What it remembers now.
    ///
    /// # Errors
    /// `Unavailable` when somebody who has to be asked does not answer.
    fn save(&self) -> Result<State>;

    /// Takes over what another one of its kind remembered.
    ///
    /// # Errors
    /// `ImageInvalid` for state that is none, or of another kind of part; `Unavailable` when the kernel refuses it.
    fn restore(&self, state: &State) -> Result<()>;
}

/// State from a structure.
///
/// # Errors
/// `Internal`: JSON has no place for it.
pub fn write<T: Serialize>(value: &T) -> Result<State> {
    serde_json::to_value(value).map_err(|e| Error::internal(format!("state: {e}")))
}

/// A structure from state.
///
/// # Errors
/// `ImageInvalid` when it is none of that kind.
pub fn read<T: DeserializeOwned>(state: &State) -> Result<T> {
    T::deserialize(state).map_err(|e| invalid(format!("state that cannot be read: {e}")))
}

/// State that does not fit.
pub fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::ImageInvalid, "", message)
}

/// The same error, with the part that it is about.
pub fn about(part: &str) -> impl Fn(Error) -> Error + '_ {
    move |error| Error {
        message: format!("{part}: {}", error.message),
        ..error
    }
}

/// Bytes, as hex digits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        const DIGITS: [char; 16] = [
            '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
        ];
        let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('0');
        let text: String = self
            .0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let nibble = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
        let pairs = text.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(nibble(*high)? << 4 | nibble(*low)?),
            _ => None,
        });
        match bytes.collect::<Option<Vec<u8>>>() {
            Some(bytes) => Ok(Bytes(bytes)),
            None => Err(serde::de::Error::custom("an odd hex string")),
        }
    }
}

impl Bytes {
    /// Exactly `N` of them.
    ///
    /// # Errors
    /// `ImageInvalid` for more or fewer.
    pub fn array<const N: usize>(&self) -> Result<[u8; N]> {
        let found = self.0.len();
        let bytes: std::result::Result<[u8; N], _> = self.0.as_slice().try_into();
        bytes.map_err(|_| invalid(format!("{found} bytes where {N} belong")))
    }
}

/// A structure of the kernel's that is bytes through and through: every bit pattern is one, and it has no padding
/// that is not a field.
///
/// # Safety
/// Just that.
pub unsafe trait Plain: Default {}

/// Its bytes.
pub fn bytes_of<T: Plain>(value: &T) -> Bytes {
    let at = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: the structure lies there, and `Plain` says that all of it is initialized bytes.
    Bytes(unsafe { std::slice::from_raw_parts(at, std::mem::size_of::<T>()) }.to_vec())
}

/// The structure that has these bytes.
///
/// # Errors
/// `ImageInvalid` for more or fewer than it has.
pub fn from_bytes<T: Plain>(bytes: &Bytes) -> Result<T> {
    let size = std::mem::size_of::<T>();
    if bytes.0.len() != size {
        return Err(invalid(format!(
            "{} bytes where {size} belong",
            bytes.0.len()
        )));
    }
    let mut value = T::default();
    // SAFETY: as many bytes as the structure has, and `Plain` says that any are good.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.0.as_ptr(),
            std::ptr::from_mut(&mut value).cast::<u8>(),
            size,
        );
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_hex_and_nothing_else() {
        let state = write(&Bytes(vec![0, 0x1f, 0xff])).unwrap();
        assert_eq!(state, "001fff");
        assert_eq!(read::<Bytes>(&state).unwrap().0, [0, 0x1f, 0xff]);
        for odd in ["0", "0g", "+1", "é"] {
            assert_eq!(
                read::<Bytes>(&odd.into()).unwrap_err().kind,
                Kind::ImageInvalid,
                "{odd}"
            );
        }
        assert!(Bytes(vec![1, 2]).array::<3>().is_err());
    }
}
