// SPDX-License-Identifier: Apache-2.0
//! Encrypted images: LUKS inside qcow2 (QEMU, docs/interop/qcow2, crypt method 2), and QEMU's old AES
//! (method 1) for reading only.
//!
//! | module    | job                                                            |
//! |-----------|----------------------------------------------------------------|
//! | `cipher`  | sectors encrypted and decrypted                                |
//! | `hash`    | the hashes, PBKDF2                                             |
//! | `split`   | the anti-forensic splitter                                     |
//! | `luks`    | the header, parsed and checked                                 |
//! | `keyslot` | the master key out of a slot and into one, safe against cuts   |
//! | `create`  | a new header                                                   |
//! | `amend`   | adding and erasing key slots                                   |
//! | `info`    | what a header says, without a passphrase                       |
//!
//! What is encrypted is guest data only: whole 512-byte sectors, wherever a mapping says that data is.
//! All metadata (tables, names, snapshots) is readable. A cluster's IVs count from its *place in the
//! file* for LUKS, and from its place on the disk for the old AES. Zeros that a mapping promises need no
//! decrypting; but a sector that was never written is not zeros once decrypted, so a new cluster is
//! always written whole (`Geometry::sealed`, in write.rs).
//!
//! An engine never hands memory of a guest to the cipher: data is gathered into a bounce buffer,
//! encrypted there and written from there, and the reverse, on the I/O thread, without any lock.
//! So a guest can neither see ciphertext nor change data between encryption and write.
//!
//! Passphrases and keys are wiped from memory when they go; nothing here prints them.

pub(crate) mod amend;
pub(crate) mod cipher;
pub(crate) mod create;
#[cfg(test)]
mod cuts;
pub(crate) mod hash;
pub(crate) mod info;
pub(crate) mod keyslot;
pub(crate) mod luks;
mod split;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::qcow2::header::{CryptMethod, Header};
use cipher::{IvGenerator, Mode, Name, Sectors, Suite, SECTOR};
use keyslot::Area;

/// The longest passphrase.
const MAX_SECRET: usize = 4096;

/// A passphrase. Wiped when it goes; never printed.
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Take over a passphrase: 1 to 4,096 bytes.
    pub fn new(bytes: Vec<u8>) -> Result<Secret> {
        let bytes = Zeroizing::new(bytes);
        if bytes.is_empty() || bytes.len() > MAX_SECRET {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("a passphrase has 1 to {MAX_SECRET} bytes"),
            ));
        }
        Ok(Secret(Arc::new(bytes)))
    }

    /// Read a passphrase: a regular file (a memfd) from its start, a pipe to its end.
    pub fn read(mut file: File) -> Result<Secret> {
        let failed = |e: io::Error| Error::io("read the passphrase", &e);
        let regular = file.metadata().map_err(failed)?.is_file();
        // Room for all of it from the start: growing would leave copies behind.
        let mut bytes = Zeroizing::new(vec![0; MAX_SECRET + 1]);
        let mut len = 0;
        while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
            let read = match regular {
                // Who wrote it may have left the offset at its end.
                true => file.read_at(rest, len as u64),
                false => file.read(rest),
            };
            match read {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(e)),
            }
        }
        bytes.truncate(len);
        Secret::new(std::mem::take(&mut *bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The cipher of one file's guest data, unlocked.
pub(crate) struct Sealer {
    sectors: Box<dyn Sectors>,
}

impl Sealer {
    /// Encrypt whole sectors that go to byte `offset` of the file.
    pub(crate) fn seal(&self, offset: u64, data: &mut [u8]) {
        self.sectors.encrypt(offset / SECTOR as u64, data);
    }

    /// Decrypt whole sectors whose IVs count from byte `place`.
    pub(crate) fn open(&self, place: u64, data: &mut [u8]) {
        self.sectors.decrypt(place / SECTOR as u64, data);
    }
}

/// The cipher of an image's guest data, by its header and a passphrase.
///
/// Errors: AccessDenied for a passphrase that opens nothing, InvalidArgument when there is none, or one
/// for an image that is not encrypted; ImageInvalid, NotSupported for the header's own faults.
pub(crate) fn unlock(
    file: &BlockFile,
    header: &Header,
    secret: Option<&Secret>,
) -> Result<Option<Sealer>> {
    let argument = |message: &str| Error::new(Kind::InvalidArgument, message);
    let (method, secret) = match (header.crypt, secret) {
        (CryptMethod::None, None) => return Ok(None),
        (CryptMethod::None, Some(_)) => {
            return Err(argument("a passphrase for an image that is not encrypted"))
        }
        (_, None) => return Err(argument("the image is encrypted: a passphrase is needed")),
        (method, Some(secret)) => (method, secret),
    };
    let sectors = match method {
        CryptMethod::None => return Ok(None),
        CryptMethod::Aes => legacy(secret)?,
        CryptMethod::Luks { offset, len } => {
            let area = Area { file, offset, len };
            let luks = area.header()?;
            let (key, _) = area.unlock(&luks, secret)?;
            luks.suite.with_key(key.bytes())?
        }
    };
    Ok(Some(Sealer { sectors }))
}

/// QEMU's first encryption: the passphrase itself, cut or filled up to 16 bytes, is the key.
fn legacy(secret: &Secret) -> Result<Box<dyn Sectors>> {
    let mut key = Zeroizing::new([0; 16]);
    key.iter_mut()
        .zip(secret.bytes())
        .for_each(|(byte, given)| *byte = *given);
    let suite = Suite {
        name: Name::Aes,
        mode: Mode::Cbc,
        iv: IvGenerator::Plain64,
    };
    suite.with_key(&*key)
}

/// Parse any bytes as a LUKS header; for fuzzing. What is accepted must survive being written again.
pub fn fuzz_luks_header(data: &[u8]) {
    let room = data.len().max(1 << 20) as u64;
    if let Ok(header) = luks::LuksHeader::parse(data, room) {
        let again = luks::LuksHeader::parse(&header.serialize(), room);
        assert_eq!(Some(header), again.ok());
    }
}
