// SPDX-License-Identifier: Apache-2.0
//! The hashes that a LUKS header may name, and PBKDF2 on them (RFC 8018).

use sha2::Digest;

use crate::error::{Error, Result};

/// A hash by its name in a LUKS header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

impl Hash {
    pub(crate) fn parse(name: &str) -> Result<Hash> {
        Ok(match name {
            "sha1" => Hash::Sha1,
            "sha224" => Hash::Sha224,
            "sha256" => Hash::Sha256,
            "sha384" => Hash::Sha384,
            "sha512" => Hash::Sha512,
            "ripemd160" => Hash::Ripemd160,
            other => {
                let message = format!("the hash '{}'", other.escape_debug());
                return Err(Error::unsupported(message));
            }
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha224 => "sha224",
            Hash::Sha256 => "sha256",
            Hash::Sha384 => "sha384",
            Hash::Sha512 => "sha512",
            Hash::Ripemd160 => "ripemd160",
        }
    }

    /// Bytes of a digest.
    pub(crate) fn len(self) -> usize {
        match self {
            Hash::Sha1 | Hash::Ripemd160 => 20,
            Hash::Sha224 => 28,
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of the parts, one behind the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        fn of<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut digest = D::new();
            parts.iter().for_each(|part| digest.update(part));
            digest.finalize().to_vec()
        }
        match self {
            Hash::Sha1 => of::<sha1::Sha1>(parts),
            Hash::Sha224 => of::<sha2::Sha224>(parts),
            Hash::Sha256 => of::<sha2::Sha256>(parts),
            Hash::Sha384 => of::<sha2::Sha384>(parts),
            Hash::Sha512 => of::<sha2::Sha512>(parts),
            Hash::Ripemd160 => of::<ripemd::Ripemd160>(parts),
        }
    }

    /// Fill `key` by PBKDF2 with HMAC of this hash.
    pub(crate) fn pbkdf2(self, secret: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        use pbkdf2::pbkdf2_hmac;
        match self {
            Hash::Sha1 => pbkdf2_hmac::<sha1::Sha1>(secret, salt, iterations, key),
            Hash::Sha224 => pbkdf2_hmac::<sha2::Sha224>(secret, salt, iterations, key),
            Hash::Sha256 => pbkdf2_hmac::<sha2::Sha256>(secret, salt, iterations, key),
            Hash::Sha384 => pbkdf2_hmac::<sha2::Sha384>(secret, salt, iterations, key),
            Hash::Sha512 => pbkdf2_hmac::<sha2::Sha512>(secret, salt, iterations, key),
            Hash::Ripemd160 => pbkdf2_hmac::<ripemd::Ripemd160>(secret, salt, iterations, key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_gives_the_keys_of_rfc_6070() {
        let mut key = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut key);
        let expected = [
            0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a, 0xbe, 0xad, 0x49, 0xd9, 0x26, 0xf7,
            0x21, 0xd0, 0x65, 0xa4, 0x29, 0xc1,
        ];
        assert_eq!(key, expected);
    }

    #[test]
    fn names_and_lengths_agree() {
        for name in ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"] {
            let hash = Hash::parse(name).expect("a hash");
            assert_eq!(hash.name(), name);
            assert_eq!(hash.digest(&[b"a", b"b"]).len(), hash.len());
            assert_eq!(hash.digest(&[b"a", b"b"]), hash.digest(&[b"ab"]));
        }
        assert!(Hash::parse("md5").is_err());
    }
}
