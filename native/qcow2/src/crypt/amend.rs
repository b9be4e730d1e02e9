// SPDX-License-Identifier: Apache-2.0
//! Adding and erasing key slots, as `qemu-img amend` has it. The rules are QEMU's (qapi/crypto.json,
//! QCryptoBlockAmendOptionsLUKS); `keyslot` says how a slot changes without a cut losing one.

use std::fs::File;
use std::time::Duration;

use super::keyslot::{self, Area};
use super::luks::{LuksHeader, SLOTS};
use super::Secret;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::locks::{self, Use};
use crate::qcow2::header::{CryptMethod, Header};

/// A change of the key slots.
#[derive(Debug, Clone)]
pub enum KeyChange {
    /// Put a passphrase into a slot.
    Add {
        /// The new passphrase.
        secret: Secret,
        /// The slot; else the first that is inactive.
        slot: Option<usize>,
        /// How long opening shall take here.
        iteration_time: Duration,
    },
    /// Erase a slot.
    Erase {
        /// Which.
        slot: usize,
    },
    /// Erase all slots that a passphrase opens.
    EraseMatching {
        /// The passphrase.
        secret: Secret,
    },
}

/// Change the key slots of the LUKS image in `file`, opened with `secret`; nobody else may write the image
/// meanwhile. With `force`, an active slot may be overwritten, and the last one erased.
pub fn amend_keys(file: &File, secret: &Secret, change: &KeyChange, force: bool) -> Result<()> {
    let file = BlockFile::new(
        file.try_clone()
            .map_err(|e| Error::io("dup of the image's fd", &e))?,
    )?;
    locks::lock(file.fd(), Use::Write)?;
    let changed = amend(&file, secret, change, force);
    locks::unlock(file.fd());
    changed
}

pub(crate) fn amend(
    file: &BlockFile,
    secret: &Secret,
    change: &KeyChange,
    force: bool,
) -> Result<()> {
    let header = Header::read(file)?;
    let CryptMethod::Luks { offset, len } = header.crypt else {
        return Err(refuse("the image has no LUKS header: it has no key slots"));
    };
    let area = Area { file, offset, len };
    let mut luks = area.header()?;
    // Whoever changes the slots proves to have a passphrase.
    let (key, _) = area.unlock(&luks, secret)?;
    match change {
        KeyChange::Add {
            secret,
            slot,
            iteration_time,
        } => {
            let free = luks.slots.iter().position(|slot| !slot.active);
            let number = slot
                .or(free)
                .ok_or_else(|| refuse("all key slots are active: erase one first"))?;
            match luks.slots.get(number) {
                Some(slot) if slot.active && !force => {
                    return Err(refuse(format!(
                        "key slot {number} is active: erase it first"
                    )))
                }
                Some(_) => {}
                None => return Err(outside(number)),
            }
            let iterations = keyslot::iterations(luks.hash, luks.key_len, *iteration_time);
            area.fill_slot(&mut luks, number, &key, secret, iterations)
        }
        KeyChange::Erase { slot } => {
            match luks.slots.get(*slot) {
                Some(found) if !found.active && !force => {
                    return Err(refuse(format!("key slot {slot} is erased already")))
                }
                Some(_) => {}
                None => return Err(outside(*slot)),
            }
            erase(&area, &mut luks, &[*slot], force)
        }
        KeyChange::EraseMatching { secret } => {
            let mut matching = Vec::new();
            for number in 0..SLOTS {
                if area.open_slot(&luks, number, secret)?.is_some() {
                    matching.push(number);
                }
            }
            if matching.is_empty() {
                return Err(Error::new(
                    Kind::AccessDenied,
                    "the old passphrase opens none of the image's key slots",
                ));
            }
            erase(&area, &mut luks, &matching, force)
        }
    }
}

fn erase(area: &Area<'_>, luks: &mut LuksHeader, slots: &[usize], force: bool) -> Result<()> {
    let is_left =
        |(number, slot): (usize, &super::luks::KeySlot)| slot.active && !slots.contains(&number);
    if !luks.slots.iter().enumerate().any(is_left) && !force {
        return Err(refuse(
            "no active key slot would be left, and the image's content would be lost for ever",
        ));
    }
    slots
        .iter()
        .try_for_each(|number| area.erase_slot(luks, *number))
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(Kind::InvalidArgument, message)
}

fn outside(number: usize) -> Error {
    refuse(format!(
        "there is no key slot {number}: they are 0 to {}",
        SLOTS - 1
    ))
}
