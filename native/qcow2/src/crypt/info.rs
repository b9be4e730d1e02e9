// SPDX-License-Identifier: Apache-2.0
//! What an image says about its encryption, for people and tools; needs no passphrase.

use super::cipher::IvGenerator;
use super::keyslot::Area;
use super::luks::{LuksHeader, STRIPES};
use crate::error::Result;
use crate::file::BlockFile;
use crate::qcow2::header::{CryptMethod, Header};

/// An encrypted image's own description.
#[derive(Debug, Clone)]
pub enum Encryption {
    /// QEMU's old AES.
    Aes,
    /// LUKS, in the words of its header.
    Luks(Box<LuksInfo>),
}

/// A LUKS header in QEMU's words.
#[derive(Debug, Clone)]
pub struct LuksInfo {
    /// "aes-256" and so on.
    pub cipher: String,
    /// "xts" or "cbc".
    pub mode: String,
    /// "plain64", "plain" or "essiv".
    pub iv: String,
    /// The hash of essiv.
    pub iv_hash: Option<String>,
    /// The hash of PBKDF2 and the splitter.
    pub hash: String,
    /// The header's UUID.
    pub uuid: String,
    /// Where a disk of its own would begin.
    pub payload_offset: u64,
    /// Iterations of the master key's digest.
    pub iterations: u32,
    /// Stripes of an active slot.
    pub stripes: u32,
    /// For each slot: iterations where it is active, and where its key material is.
    pub slots: Vec<(Option<u32>, u64)>,
}

/// The description of a qcow2 image's encryption; None for one without.
pub(crate) fn describe(file: &BlockFile, header: &Header) -> Result<Option<Encryption>> {
    Ok(match header.crypt {
        CryptMethod::None => None,
        CryptMethod::Aes => Some(Encryption::Aes),
        CryptMethod::Luks { offset, len } => {
            let luks = Area { file, offset, len }.header()?;
            Some(Encryption::Luks(Box::new(luks_info(&luks))))
        }
    })
}

fn luks_info(header: &LuksHeader) -> LuksInfo {
    let suite = header.suite;
    let bits = suite.cipher_key_len(header.key_len) * 8;
    LuksInfo {
        cipher: format!("{}-{bits}", suite.name.text()),
        mode: suite.mode.name().to_owned(),
        iv: suite.iv.text().to_owned(),
        iv_hash: match suite.iv {
            IvGenerator::Essiv(hash) => Some(hash.name().to_owned()),
            _ => None,
        },
        hash: header.hash.name().to_owned(),
        uuid: header.uuid.clone(),
        payload_offset: header.payload,
        iterations: header.digest_iterations,
        stripes: STRIPES,
        slots: header
            .slots
            .iter()
            .map(|slot| (slot.active.then_some(slot.iterations), slot.offset))
            .collect(),
    }
}
