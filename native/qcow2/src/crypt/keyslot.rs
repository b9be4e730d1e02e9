// SPDX-License-Identifier: Apache-2.0
//! Key slots: the master key out of one by a passphrase, and into one.
//!
//! A slot's material is the master key, split into stripes and encrypted with the image's own cipher
//! under a key that PBKDF2 makes of the passphrase; the digest in the header tells whether what came
//! out is the master key.
//!
//! **A cut never loses a slot that worked.** A header is changed in three steps with a sync between
//! them, and the only step that makes a slot active writes one sector (`Step`):
//!
//! | to fill a slot                                    | to erase one                         |
//! |---------------------------------------------------|--------------------------------------|
//! | its fields and material, still inactive; sync     | inactive, all else as it was; sync   |
//! | active; sync                                      | random bytes over its material; sync |
//!
//! Fields of two slots may share a sector; both are written as they are. The state field of every slot
//! lies within one sector, while slot 6's fields lie in two: so "active" comes last, alone.

use std::time::Duration;

use zeroize::Zeroizing;

use super::luks::{self, LuksHeader, STRIPES};
use super::Secret;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;

/// A place in a file with a LUKS header and its key material.
pub(crate) struct Area<'a> {
    pub(crate) file: &'a BlockFile,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Area<'_> {
    /// The checked header.
    pub(crate) fn header(&self) -> Result<LuksHeader> {
        let mut bytes = [0; luks::LENGTH];
        self.file.read_at(&mut bytes, self.offset)?;
        LuksHeader::parse(&bytes, self.len)
    }

    pub(crate) fn write_header(&self, header: &LuksHeader) -> Result<()> {
        self.file.write_at(&header.serialize(), self.offset)
    }

    fn write_material(&self, header: &LuksHeader, number: usize, bytes: &[u8]) -> Result<()> {
        let slot = header.slots.get(number).ok_or_else(no_slot)?;
        self.file.write_at(bytes, self.offset + slot.offset)
    }

    /// The master key, by the first slot that the passphrase opens; gives that slot's number too.
    pub(crate) fn unlock(
        &self,
        header: &LuksHeader,
        secret: &Secret,
    ) -> Result<(MasterKey, usize)> {
        for number in 0..luks::SLOTS {
            if let Some(key) = self.open_slot(header, number, secret)? {
                return Ok((key, number));
            }
        }
        Err(Error::new(
            Kind::AccessDenied,
            "the passphrase opens none of the image's key slots",
        ))
    }

    /// What the passphrase makes of one slot; None if that is not the master key.
    pub(crate) fn open_slot(
        &self,
        header: &LuksHeader,
        number: usize,
        secret: &Secret,
    ) -> Result<Option<MasterKey>> {
        let slot = header.slots.get(number).ok_or_else(no_slot)?;
        if !slot.active {
            return Ok(None);
        }
        let mut slot_key = Zeroizing::new(vec![0; header.key_len]);
        let hash = header.hash;
        hash.pbkdf2(secret.bytes(), &slot.salt, slot.iterations, &mut slot_key);
        let mut material = Zeroizing::new(vec![0; header.material_len() as usize]);
        self.file
            .read_at(&mut material, self.offset + slot.offset)?;
        header.suite.with_key(&slot_key)?.decrypt(0, &mut material);
        let key = MasterKey(super::split::join(hash, header.key_len, &material));
        let digest = digest(header, &key);
        // Whether the digests are equal tells nothing more than the answer does.
        Ok((digest == header.digest).then_some(key))
    }

    /// Let slot `number` hold `key` under the passphrase, and make it active.
    pub(crate) fn fill_slot(
        &self,
        header: &mut LuksHeader,
        number: usize,
        key: &MasterKey,
        secret: &Secret,
        iterations: u32,
    ) -> Result<()> {
        let mut salt = [0; 32];
        random(&mut salt)?;
        let mut slot_key = Zeroizing::new(vec![0; header.key_len]);
        header
            .hash
            .pbkdf2(secret.bytes(), &salt, iterations, &mut slot_key);
        let mut stripes = Zeroizing::new(vec![0; header.key_len * (STRIPES as usize - 1)]);
        random(&mut stripes)?;
        let mut material = super::split::split(header.hash, &key.0, &stripes);
        header.suite.with_key(&slot_key)?.encrypt(0, &mut material);

        let slot = header.slots.get_mut(number).ok_or_else(no_slot)?;
        (slot.active, slot.salt, slot.iterations) = (false, salt, iterations);
        self.write_header(header)?;
        self.write_material(header, number, &material)?;
        self.file.sync()?;
        header.slots.get_mut(number).ok_or_else(no_slot)?.active = true;
        self.write_header(header)?;
        self.file.sync()
    }

    /// Make slot `number` inactive for ever. The caller answers for another one being left.
    pub(crate) fn erase_slot(&self, header: &mut LuksHeader, number: usize) -> Result<()> {
        let slot = header.slots.get_mut(number).ok_or_else(no_slot)?;
        slot.active = false;
        self.write_header(header)?;
        self.file.sync()?;
        let slot = header.slots.get_mut(number).ok_or_else(no_slot)?;
        (slot.salt, slot.iterations) = ([0; 32], 0);
        let mut noise = vec![0; header.material_len() as usize];
        random(&mut noise)?;
        self.write_material(header, number, &noise)?;
        self.write_header(header)?;
        self.file.sync()
    }
}

/// The key that the image's data is encrypted with.
pub(crate) struct MasterKey(Zeroizing<Vec<u8>>);

impl MasterKey {
    pub(crate) fn new(len: usize) -> Result<MasterKey> {
        let mut key = Zeroizing::new(vec![0; len]);
        random(&mut key)?;
        Ok(MasterKey(key))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// PBKDF2 of the master key, as the header has it.
pub(crate) fn digest(header: &LuksHeader, key: &MasterKey) -> [u8; 20] {
    let mut digest = [0; 20];
    header.hash.pbkdf2(
        &key.0,
        &header.digest_salt,
        header.digest_iterations,
        &mut digest,
    );
    digest
}

/// How many PBKDF2 iterations for a key of `len` bytes take about `time` here: measured for a small part
/// of that time.
pub(crate) fn iterations(hash: super::hash::Hash, len: usize, time: Duration) -> u32 {
    let enough = (time / 20).clamp(Duration::from_millis(2), Duration::from_millis(100));
    let mut key = Zeroizing::new(vec![0; len]);
    let mut count = luks::MIN_ITERATIONS;
    loop {
        let begun = cpu_time();
        hash.pbkdf2(b"how fast is this", &[0; 32], count, &mut key);
        let taken = cpu_time().saturating_sub(begun);
        if taken >= enough || count >= luks::MAX_ITERATIONS / 2 {
            let wanted = f64::from(count) * time.as_secs_f64() / taken.as_secs_f64();
            return (wanted as u32).clamp(luks::MIN_ITERATIONS, luks::MAX_ITERATIONS);
        }
        count *= 2;
    }
}

/// What this thread has used: others' load must not make keys weaker.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` outlives the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Random bytes from the kernel.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    for part in bytes.chunks_mut(256) {
        // SAFETY: the pointer and length are those of a live, writable slice.
        let got = unsafe { libc::getrandom(part.as_mut_ptr().cast(), part.len(), 0) };
        // Up to 256 bytes come whole, or not at all (getrandom(2)).
        if got != part.len() as isize {
            return Err(Error::io("getrandom", &std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn no_slot() -> Error {
    Error::new(
        Kind::InvalidArgument,
        format!("a LUKS header has key slots 0 to {}", luks::SLOTS - 1),
    )
}
