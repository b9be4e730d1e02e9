// SPDX-License-Identifier: Apache-2.0
//! The LUKS1 header ("LUKS On-Disk Format Specification" 1.2.1), parsed into a typed value once, with
//! every bound checked here, so that nothing behind it checks again. What is refused:
//!
//! | what                                                          | why                                        |
//! |---------------------------------------------------------------|--------------------------------------------|
//! | key material over the header, over another slot's, or outside | writing one slot would destroy another     |
//! | stripes other than 4,000                                      | nobody writes others; bounds memory        |
//! | more than `MAX_ITERATIONS` in a slot or for the digest        | bounds time: about half a minute a slot    |
//! | key lengths that no cipher has                                | bounds memory: at most 64 bytes of key     |
//! | keys that are not whole sectors when split (AES-192 in CBC)   | QEMU cannot read or write them either      |

use super::cipher::{Suite, SECTOR};
use super::hash::Hash;
use crate::bytes::{be32, put32};
use crate::error::{Error, Result};

/// Bytes of the header without key material.
pub(crate) const LENGTH: usize = 592;
/// Key slots of every header.
pub(crate) const SLOTS: usize = 8;
/// Stripes of the anti-forensic splitter.
pub(crate) const STRIPES: u32 = 4000;
/// The most PBKDF2 iterations that are tried.
pub(crate) const MAX_ITERATIONS: u32 = 1 << 27;
/// The fewest that are written.
pub(crate) const MIN_ITERATIONS: u32 = 1000;
/// Key material begins, and is aligned, here.
const ALIGNMENT: u64 = 4096;

const MAGIC: [u8; 8] = *b"LUKS\xba\xbe\x00\x01";
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// Where fields stand.
mod at {
    pub(super) const CIPHER: usize = 8;
    pub(super) const MODE: usize = 40;
    pub(super) const HASH: usize = 72;
    pub(super) const PAYLOAD: usize = 104;
    pub(super) const KEY_LEN: usize = 108;
    pub(super) const DIGEST: usize = 112;
    pub(super) const SALT: usize = 132;
    pub(super) const ITERATIONS: usize = 164;
    pub(super) const UUID: usize = 168;
    pub(super) const SLOTS: usize = 208;
}

/// Bytes of a slot's fields.
const SLOT_LENGTH: usize = 48;

/// One key slot: the master key under a key that a passphrase gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeySlot {
    pub(crate) active: bool,
    pub(crate) iterations: u32,
    pub(crate) salt: [u8; 32],
    /// Where the key material begins, in bytes from the header's start.
    pub(crate) offset: u64,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LuksHeader {
    pub(crate) suite: Suite,
    pub(crate) hash: Hash,
    /// Where a disk of its own would begin, in bytes; inside a qcow2 image it means nothing.
    pub(crate) payload: u64,
    pub(crate) key_len: usize,
    /// PBKDF2 of the master key, which tells the right one.
    pub(crate) digest: [u8; 20],
    pub(crate) digest_salt: [u8; 32],
    pub(crate) digest_iterations: u32,
    pub(crate) uuid: String,
    pub(crate) slots: [KeySlot; SLOTS],
}

impl LuksHeader {
    /// Parse a header that has `room` bytes in the image, key material included.
    pub(crate) fn parse(bytes: &[u8], room: u64) -> Result<LuksHeader> {
        let cut = || Error::invalid("the LUKS header is cut short");
        match bytes.get(..8) {
            Some(magic) if magic == MAGIC => {}
            Some(magic) if magic.get(..6) == MAGIC.get(..6) => {
                return Err(Error::unsupported("another version of LUKS than 1"));
            }
            _ => return Err(Error::invalid("the image's LUKS header is not one")),
        }
        let word = |at: usize| be32(bytes, at).ok_or_else(cut);
        let suite = Suite::parse(text(bytes, at::CIPHER)?, text(bytes, at::MODE)?)?;
        let header = LuksHeader {
            suite,
            hash: Hash::parse(text(bytes, at::HASH)?)?,
            payload: u64::from(word(at::PAYLOAD)?) * SECTOR as u64,
            key_len: word(at::KEY_LEN)? as usize,
            digest: array(bytes, at::DIGEST)?,
            digest_salt: array(bytes, at::SALT)?,
            digest_iterations: word(at::ITERATIONS)?,
            uuid: uuid(bytes),
            slots: [
                parse_slot(bytes, 0)?,
                parse_slot(bytes, 1)?,
                parse_slot(bytes, 2)?,
                parse_slot(bytes, 3)?,
                parse_slot(bytes, 4)?,
                parse_slot(bytes, 5)?,
                parse_slot(bytes, 6)?,
                parse_slot(bytes, 7)?,
            ],
        };
        header.check(room)?;
        Ok(header)
    }

    fn check(&self, room: u64) -> Result<()> {
        check_key_len(&self.suite, self.key_len)?;
        check_iterations(self.digest_iterations, "the master key's digest")?;
        for (number, slot) in self.slots.iter().enumerate() {
            if slot.active {
                check_iterations(slot.iterations, &format!("key slot {number}"))?;
            }
            let end = slot.offset + self.material_len();
            if slot.offset < LENGTH as u64 || end > room {
                return Err(Error::invalid(format!(
                    "the key material of slot {number} does not lie behind the LUKS header"
                )));
            }
            for (other, before) in self.slots.iter().enumerate().take(number) {
                if slot.offset < before.offset + self.material_len() && before.offset < end {
                    return Err(Error::invalid(format!(
                        "the key material of slots {other} and {number} overlaps"
                    )));
                }
            }
        }
        Ok(())
    }

    /// A new header without an active slot; salts and digest are still to be filled in.
    pub(crate) fn new(
        suite: Suite,
        hash: Hash,
        key_len: usize,
        uuid: String,
    ) -> Result<LuksHeader> {
        check_key_len(&suite, key_len)?;
        let step = material_len(key_len).next_multiple_of(ALIGNMENT);
        let slot = |number: u64| KeySlot {
            active: false,
            iterations: 0,
            salt: [0; 32],
            offset: ALIGNMENT + number * step,
        };
        Ok(LuksHeader {
            suite,
            hash,
            payload: ALIGNMENT + SLOTS as u64 * step,
            key_len,
            digest: [0; 20],
            digest_salt: [0; 32],
            digest_iterations: 0,
            uuid,
            slots: [0, 1, 2, 3, 4, 5, 6, 7].map(slot),
        })
    }

    /// Bytes of a slot's key material.
    pub(crate) fn material_len(&self) -> u64 {
        material_len(self.key_len)
    }

    /// The header as it stands at the area's start.
    pub(crate) fn serialize(&self) -> [u8; LENGTH] {
        let mut out = [0u8; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = out.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let (name, mode) = self.suite.names();
        put(0, &MAGIC);
        put(at::CIPHER, name.as_bytes());
        put(at::MODE, mode.as_bytes());
        put(at::HASH, self.hash.name().as_bytes());
        put(at::DIGEST, &self.digest);
        put(at::SALT, &self.digest_salt);
        put(at::UUID, self.uuid.as_bytes());
        for (number, slot) in self.slots.iter().enumerate() {
            put(at::SLOTS + number * SLOT_LENGTH + 8, &slot.salt);
        }
        put32(&mut out, at::PAYLOAD, (self.payload / SECTOR as u64) as u32);
        put32(&mut out, at::KEY_LEN, self.key_len as u32);
        put32(&mut out, at::ITERATIONS, self.digest_iterations);
        for (number, slot) in self.slots.iter().enumerate() {
            let start = at::SLOTS + number * SLOT_LENGTH;
            put32(&mut out, start, if slot.active { ACTIVE } else { INACTIVE });
            put32(&mut out, start + 4, slot.iterations);
            put32(&mut out, start + 40, (slot.offset / SECTOR as u64) as u32);
            put32(&mut out, start + 44, STRIPES);
        }
        out
    }
}

fn material_len(key_len: usize) -> u64 {
    key_len as u64 * u64::from(STRIPES)
}

fn check_key_len(suite: &Suite, key_len: usize) -> Result<()> {
    let one = suite.cipher_key_len(key_len);
    if key_len > 64 || !matches!(one, 16 | 24 | 32) || key_len % 8 != 0 {
        return Err(Error::unsupported(format!(
            "{} with a key of {key_len} bytes",
            suite.names().0
        )));
    }
    if material_len(key_len) % SECTOR as u64 != 0 {
        return Err(Error::unsupported(
            "keys of 192 bits other than with xts: split, they are not whole sectors",
        ));
    }
    Ok(())
}

fn check_iterations(count: u32, whose: &str) -> Result<()> {
    if count == 0 || count > MAX_ITERATIONS {
        return Err(Error::invalid(format!(
            "{whose} wants {count} iterations; 1 to {MAX_ITERATIONS} are sensible"
        )));
    }
    Ok(())
}

fn parse_slot(bytes: &[u8], number: usize) -> Result<KeySlot> {
    let cut = || Error::invalid("the LUKS header is cut short");
    let start = at::SLOTS + number * SLOT_LENGTH;
    let word = |at: usize| be32(bytes, start + at).ok_or_else(cut);
    let active = match word(0)? {
        ACTIVE => true,
        INACTIVE => false,
        state => {
            return Err(Error::invalid(format!(
                "key slot {number} is neither active nor inactive, but {state:#x}"
            )))
        }
    };
    let stripes = word(44)?;
    if stripes != STRIPES {
        return Err(Error::invalid(format!(
            "key slot {number} has {stripes} stripes, not {STRIPES}"
        )));
    }
    Ok(KeySlot {
        active,
        iterations: word(4)?,
        salt: array(bytes, start + 8)?,
        offset: u64::from(word(40)?) * SECTOR as u64,
    })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..at + N)
        .and_then(|part| part.try_into().ok())
        .ok_or_else(|| Error::invalid("the LUKS header is cut short"))
}

/// A field of 32 bytes, with a NUL behind its text.
fn text(bytes: &[u8], at: usize) -> Result<&str> {
    let field = bytes.get(at..at + 32).unwrap_or(&[]);
    let len = field.iter().position(|byte| *byte == 0);
    len.and_then(|len| std::str::from_utf8(field.get(..len)?).ok())
        .ok_or_else(|| Error::invalid("a name in the LUKS header is not text"))
}

fn uuid(bytes: &[u8]) -> String {
    let field = bytes.get(at::UUID..at::SLOTS).unwrap_or(&[]);
    let printable = field.iter().take_while(|byte| byte.is_ascii_graphic());
    printable.map(|byte| char::from(*byte)).collect()
}
