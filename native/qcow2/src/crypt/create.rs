// SPDX-License-Identifier: Apache-2.0
//! A new LUKS header: master key, digest, and the first key slot.

use std::time::Duration;

use super::cipher::{IvGenerator, Mode, Name, Suite};
use super::hash::Hash;
use super::keyslot::{self, Area, MasterKey};
use super::luks::{LuksHeader, MIN_ITERATIONS};
use super::Secret;
use crate::error::{Error, Kind, Result};

/// How a new image is encrypted. The names are QEMU's; what is not given is AES-256 in XTS mode with
/// plain64, SHA-256, and two seconds to open it.
#[derive(Debug, Clone)]
pub struct EncryptOptions {
    /// The passphrase of the first key slot.
    pub secret: Secret,
    /// "aes-256" and so on.
    pub cipher: Option<String>,
    /// "xts" or "cbc".
    pub mode: Option<String>,
    /// "plain64", "plain" or "essiv".
    pub iv: Option<String>,
    /// The hash of essiv.
    pub iv_hash: Option<String>,
    /// The hash of PBKDF2 and the splitter.
    pub hash: Option<String>,
    /// How long opening shall take here.
    pub iteration_time: Duration,
}

impl EncryptOptions {
    /// The defaults under a passphrase.
    pub fn new(secret: Secret) -> EncryptOptions {
        EncryptOptions {
            secret,
            cipher: None,
            mode: None,
            iv: None,
            iv_hash: None,
            hash: None,
            iteration_time: Duration::from_millis(2000),
        }
    }

    /// The header that these options make, without key and slots.
    pub(crate) fn header(&self) -> Result<LuksHeader> {
        fn or<'a>(given: &'a Option<String>, default: &'static str) -> &'a str {
            given.as_deref().unwrap_or(default)
        }
        let (name, bits) = or(&self.cipher, "aes-256")
            .split_once('-')
            .unwrap_or((or(&self.cipher, ""), ""));
        let mode = or(&self.mode, "xts");
        let iv = or(&self.iv, "plain64");
        let described = match iv {
            "essiv" => format!("{mode}-essiv:{}", or(&self.iv_hash, "sha256")),
            other => format!("{mode}-{other}"),
        };
        let suite = Suite::parse(name, &described).map_err(wrong_option)?;
        let bytes = match bits {
            "128" => 16,
            "192" => 24,
            "256" => 32,
            _ => {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("the cipher '{name}' has keys of 128, 192 or 256 bits"),
                ))
            }
        };
        let key_len = if suite.mode == Mode::Xts {
            2 * bytes
        } else {
            bytes
        };
        let hash = Hash::parse(or(&self.hash, "sha256")).map_err(wrong_option)?;
        LuksHeader::new(suite, hash, key_len, uuid()?).map_err(wrong_option)
    }
}

fn wrong_option(error: Error) -> Error {
    Error::new(Kind::InvalidArgument, error.message())
}

/// Write a new header and its first key slot; gives the header.
pub(crate) fn write(area: &Area<'_>, options: &EncryptOptions) -> Result<()> {
    let mut header = options.header()?;
    let key = MasterKey::new(header.key_len)?;
    keyslot::random(&mut header.digest_salt)?;
    let time = options.iteration_time;
    // An eighth for the digest, which is computed once for each slot that is tried (as cryptsetup does).
    let digest_iterations = keyslot::iterations(header.hash, header.digest.len(), time / 8);
    header.digest_iterations = digest_iterations.max(MIN_ITERATIONS);
    header.digest = keyslot::digest(&header, &key);
    let iterations = keyslot::iterations(header.hash, header.key_len, time);
    area.fill_slot(&mut header, 0, &key, &options.secret, iterations)
}

/// A random UUID (RFC 9562, version 4) as text.
fn uuid() -> Result<String> {
    let mut bytes = [0u8; 16];
    keyslot::random(&mut bytes)?;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76 | 3 << 62) | 4 << 76 | 2 << 62;
    let text = format!("{number:032x}");
    let mut parts = Vec::new();
    let mut rest = text.as_str();
    for len in [8, 4, 4, 4, 12] {
        let (part, behind) = rest.split_at(len);
        parts.push(part);
        rest = behind;
    }
    Ok(parts.join("-"))
}

impl Name {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Name::Aes => "aes",
            Name::Serpent => "serpent",
            Name::Twofish => "twofish",
        }
    }
}

impl IvGenerator {
    pub(crate) fn text(self) -> &'static str {
        match self {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Essiv(_) => "essiv",
        }
    }
}
