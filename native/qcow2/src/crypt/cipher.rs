// SPDX-License-Identifier: Apache-2.0
//! Sectors encrypted and decrypted: a block cipher of 128-bit blocks, in XTS or CBC mode, with the
//! IV of each 512-byte sector made from its number.
//!
//! | name    | key bytes          | source                                     |
//! |---------|--------------------|--------------------------------------------|
//! | aes     | 16, 24, 32         | RustCrypto `aes` (AES-NI where the CPU has it) |
//! | serpent | 16, 24, 32         | RustCrypto `serpent`                       |
//! | twofish | 16, 24, 32         | RustCrypto `twofish`                       |
//!
//! XTS takes two such keys. IV generators (cryptsetup's on-disk format): `plain64` and `plain` are the
//! number in little endian, the latter cut to 32 bits; `essiv` encrypts it under the hash of the
//! key. Left out on purpose though QEMU has them: ECB and CTR, with which equal sectors or rewritten
//! ones tell about each other, and CAST5 with its 64-bit blocks.
//!
//! The crates' ciphers take many blocks at once; so everything here is laid out to hand them over
//! together: XTS all blocks of eight sectors, CBC one block of each of eight sectors (a chain within a sector
//! cannot be run side by side, but sectors are independent).

use cipher::array::Array;
use cipher::consts::U16;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use zeroize::Zeroizing;

use super::hash::Hash;
use crate::error::{Error, Result};

/// Bytes that are encrypted together under one IV.
pub(crate) const SECTOR: usize = 512;

/// Sectors handled together.
const BATCH: usize = 8;

/// A sector's blocks.
const BLOCKS: usize = SECTOR / 16;

type Block = Array<u8, U16>;

/// A cipher of 128-bit blocks.
trait Cipher128:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync
{
}
impl<C> Cipher128 for C where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync
{
}

/// Which cipher, by its name in a LUKS header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    Aes,
    Serpent,
    Twofish,
}

/// How blocks of a sector are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Xts,
    Cbc,
}

/// How a sector's IV is made from its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Hash),
}

/// Everything but the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Suite {
    pub(crate) name: Name,
    pub(crate) mode: Mode,
    pub(crate) iv: IvGenerator,
}

impl Suite {
    /// Parse a LUKS header's cipher name ("aes") and mode ("xts-plain64", "cbc-essiv:sha256").
    pub(crate) fn parse(name: &str, mode: &str) -> Result<Suite> {
        let unsupported = |what: &str, value: &str| {
            Error::unsupported(format!("the {what} '{}'", value.escape_debug()))
        };
        let name = match name {
            "aes" => Name::Aes,
            "serpent" => Name::Serpent,
            "twofish" => Name::Twofish,
            other => return Err(unsupported("cipher", other)),
        };
        let (chaining, generator) = mode
            .split_once('-')
            .ok_or_else(|| unsupported("cipher mode", mode))?;
        // dm-crypt and QEMU ignore a hash behind a generator that has none.
        let (generator, hash) = match generator.split_once(':') {
            Some((generator, hash)) => (generator, Some(hash)),
            None => (generator, None),
        };
        let mode = match chaining {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            other => return Err(unsupported("cipher mode", other)),
        };
        let iv = match (generator, hash) {
            ("plain", _) => IvGenerator::Plain,
            ("plain64", _) => IvGenerator::Plain64,
            ("essiv", Some(hash)) => IvGenerator::Essiv(Hash::parse(hash)?),
            ("essiv", None) => {
                return Err(Error::invalid("the IV generator essiv names no hash"));
            }
            (other, _) => return Err(unsupported("IV generator", other)),
        };
        if matches!(iv, IvGenerator::Essiv(hash) if hash.len() != 32) {
            return Err(Error::unsupported(
                "essiv with another hash than sha256: no cipher has keys of its length",
            ));
        }
        Ok(Suite { name, mode, iv })
    }

    /// The names as a LUKS header has them.
    pub(crate) fn names(&self) -> (&'static str, String) {
        let name = match self.name {
            Name::Aes => "aes",
            Name::Serpent => "serpent",
            Name::Twofish => "twofish",
        };
        let mode = self.mode.name();
        let generator = match self.iv {
            IvGenerator::Plain => "plain".to_owned(),
            IvGenerator::Plain64 => "plain64".to_owned(),
            IvGenerator::Essiv(hash) => format!("essiv:{}", hash.name()),
        };
        (name, format!("{mode}-{generator}"))
    }

    /// Bytes of one of the cipher's keys, from those of the whole key.
    pub(crate) fn cipher_key_len(&self, key_len: usize) -> usize {
        match self.mode {
            Mode::Xts => key_len / 2,
            Mode::Cbc => key_len,
        }
    }

    /// The sectors' cipher under `key`. Refused when no such cipher has keys of that length.
    pub(crate) fn with_key(&self, key: &[u8]) -> Result<Box<dyn Sectors>> {
        let len = self.cipher_key_len(key.len());
        match (self.name, len) {
            (Name::Aes, 16) => self.keyed::<aes::Aes128>(key),
            (Name::Aes, 24) => self.keyed::<aes::Aes192>(key),
            (Name::Aes, 32) => self.keyed::<aes::Aes256>(key),
            (Name::Serpent, 16 | 24 | 32) => self.keyed::<serpent::Serpent>(key),
            (Name::Twofish, 16 | 24 | 32) => self.keyed::<twofish::Twofish>(key),
            _ => Err(Error::unsupported(format!(
                "{} with keys of {} bits",
                self.names().0,
                len * 8
            ))),
        }
    }

    fn keyed<C: Cipher128 + KeyInit + 'static>(&self, key: &[u8]) -> Result<Box<dyn Sectors>> {
        let wrong = || Error::unsupported("a key of this length");
        let iv = match self.iv {
            IvGenerator::Plain => Iv::Number { mask: 0xffff_ffff },
            IvGenerator::Plain64 => Iv::Number { mask: u64::MAX },
            IvGenerator::Essiv(hash) => {
                let salt = Zeroizing::new(hash.digest(&[key]));
                Iv::Encrypted(self.essiv(&salt)?)
            }
        };
        Ok(match self.mode {
            Mode::Cbc => Box::new(Cbc {
                cipher: C::new_from_slice(key).map_err(|_| wrong())?,
                iv,
            }),
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Box::new(Xts {
                    cipher: C::new_from_slice(data).map_err(|_| wrong())?,
                    tweak: C::new_from_slice(tweak).map_err(|_| wrong())?,
                    iv,
                })
            }
        })
    }

    fn essiv(&self, salt: &[u8]) -> Result<Box<dyn Blocks>> {
        let wrong = || Error::unsupported("essiv with a hash of this length");
        Ok(match self.name {
            Name::Aes => Box::new(aes::Aes256::new_from_slice(salt).map_err(|_| wrong())?),
            Name::Serpent => Box::new(serpent::Serpent::new_from_slice(salt).map_err(|_| wrong())?),
            Name::Twofish => Box::new(twofish::Twofish::new_from_slice(salt).map_err(|_| wrong())?),
        })
    }
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Xts => "xts",
            Mode::Cbc => "cbc",
        }
    }
}

/// Whole sectors, the first of which has the number `first`. What is behind the last whole sector is
/// left alone.
pub(crate) trait Sectors: Send + Sync {
    fn encrypt(&self, first: u64, data: &mut [u8]);
    fn decrypt(&self, first: u64, data: &mut [u8]);
}

/// Blocks encrypted one by one, for essiv.
trait Blocks: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
}

impl<C: Cipher128> Blocks for C {
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(blocks);
    }
}

enum Iv {
    Number { mask: u64 },
    Encrypted(Box<dyn Blocks>),
}

impl Iv {
    /// The IVs of a batch of sectors, the first of which has the number `first`.
    fn batch(&self, first: u64) -> [Block; BATCH] {
        let mut ivs = [Block::default(); BATCH];
        let mask = match self {
            Iv::Number { mask } => *mask,
            Iv::Encrypted(_) => u64::MAX,
        };
        for (n, iv) in ivs.iter_mut().enumerate() {
            let number = first.wrapping_add(n as u64) & mask;
            *iv = u128::from(number).to_le_bytes().into();
        }
        if let Iv::Encrypted(cipher) = self {
            cipher.encrypt(&mut ivs);
        }
        ivs
    }
}

/// XTS (IEEE 1619): each block is masked before and after with a tweak that doubles from block to block.
struct Xts<C> {
    cipher: C,
    tweak: C,
    iv: Iv,
}

/// The masks of a batch's blocks, in memory order.
type Masks = [[u64; 2]; BATCH * BLOCKS];

impl<C: Cipher128> Xts<C> {
    fn each_batch(&self, first: u64, data: &mut [u8], transform: impl Fn(&C, &mut [Block])) {
        let mut masks: Masks = [[0; 2]; BATCH * BLOCKS];
        for (n, batch) in data.chunks_mut(SECTOR * BATCH).enumerate() {
            let whole = batch.len() / SECTOR * SECTOR;
            let batch = batch.get_mut(..whole).unwrap_or(&mut []);
            let mut tweaks = self.iv.batch(first.wrapping_add((n * BATCH) as u64));
            self.tweak.encrypt_blocks(&mut tweaks);
            for (tweak, masks) in tweaks.iter().zip(masks.chunks_exact_mut(BLOCKS)) {
                double_on(u128::from_le_bytes((*tweak).into()), masks);
            }
            mask(batch, &masks);
            let (blocks, _) = Block::slice_as_chunks_mut(batch);
            transform(&self.cipher, blocks);
            mask(batch, &masks);
        }
    }
}

/// A sector's masks: its tweak, and each the one before times x in GF(2^128), without a branch on secret bits.
fn double_on(mut tweak: u128, masks: &mut [[u64; 2]]) {
    for mask in masks {
        *mask = [(tweak as u64).to_le(), ((tweak >> 64) as u64).to_le()];
        tweak = tweak << 1 ^ (tweak >> 127).wrapping_neg() & 0x87;
    }
}

/// Written so that it becomes vector instructions.
fn mask(batch: &mut [u8], masks: &Masks) {
    for (block, mask) in batch.chunks_exact_mut(16).zip(masks) {
        let (low, high) = block.split_at_mut(8);
        for (half, mask) in [low, high].into_iter().zip(mask) {
            for (byte, mask) in half.iter_mut().zip(mask.to_ne_bytes()) {
                *byte ^= mask;
            }
        }
    }
}

impl<C: Cipher128> Sectors for Xts<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.each_batch(first, data, C::encrypt_blocks);
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.each_batch(first, data, C::decrypt_blocks);
    }
}

struct Cbc<C> {
    cipher: C,
    iv: Iv,
}

impl<C: Cipher128> Sectors for Cbc<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (n, batch) in data.chunks_mut(SECTOR * BATCH).enumerate() {
            let mut chains = self.iv.batch(first.wrapping_add((n * BATCH) as u64));
            for at in (0..SECTOR).step_by(16) {
                let blocks = |sector: &[u8]| -> [u8; 16] {
                    sector
                        .get(at..at + 16)
                        .and_then(|block| block.try_into().ok())
                        .unwrap_or_default()
                };
                for (chain, sector) in chains.iter_mut().zip(batch.chunks_exact(SECTOR)) {
                    *chain = xor(*chain, blocks(sector).into());
                }
                self.cipher.encrypt_blocks(&mut chains);
                for (chain, sector) in chains.iter().zip(batch.chunks_exact_mut(SECTOR)) {
                    if let Some(block) = sector.get_mut(at..at + 16) {
                        block.copy_from_slice(chain);
                    }
                }
            }
        }
    }

    fn decrypt(&self, first: u64, data: &mut [u8]) {
        let mut before = [Block::default(); SECTOR / 16];
        for (n, batch) in data.chunks_mut(SECTOR * BATCH).enumerate() {
            let ivs = self.iv.batch(first.wrapping_add((n * BATCH) as u64));
            for (iv, sector) in ivs.into_iter().zip(batch.chunks_exact_mut(SECTOR)) {
                let (blocks, _) = Block::slice_as_chunks_mut(sector);
                before.copy_from_slice(blocks);
                self.cipher.decrypt_blocks(blocks);
                let chain = std::iter::once(&iv).chain(&before);
                for (block, previous) in blocks.iter_mut().zip(chain) {
                    *block = xor(*block, *previous);
                }
            }
        }
    }
}

fn xor(one: Block, other: Block) -> Block {
    (u128::from_ne_bytes(one.into()) ^ u128::from_ne_bytes(other.into()))
        .to_ne_bytes()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(name: &str, mode: &str) -> Suite {
        Suite::parse(name, mode).expect("a suite")
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex"))
            .collect()
    }

    #[test]
    fn xts_gives_the_ciphertext_of_ieee_1619() {
        // IEEE 1619-2007, annex B, vector 4: AES-128, 512 bytes, sector 0.
        let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
        let mut data: Vec<u8> = (0..512).map(|n| n as u8).collect();
        suite("aes", "xts-plain64")
            .with_key(&key)
            .expect("a key")
            .encrypt(0, &mut data);
        assert_eq!(
            data[..32],
            hex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c")
        );
    }

    #[test]
    fn cbc_gives_the_ciphertext_of_nist() {
        // NIST SP 800-38A, F.2.1, with an IV that is the sector number 0 xor its own.
        let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
        let iv = hex("000102030405060708090a0b0c0d0e0f");
        let mut data = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        for (byte, mask) in data.iter_mut().zip(iv) {
            *byte ^= mask;
        }
        data.resize(512, 0);
        suite("aes", "cbc-plain")
            .with_key(&key)
            .expect("a key")
            .encrypt(0, &mut data);
        assert_eq!(
            data[..32],
            hex("7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2")
        );
    }

    #[test]
    fn every_suite_decrypts_what_it_encrypts_wherever_it_is_cut() {
        let plain: Vec<u8> = (0..512 * 21u32).map(|n| ((n * n) >> 7) as u8).collect();
        for name in ["aes", "serpent", "twofish"] {
            for mode in [
                "xts-plain64",
                "xts-plain",
                "xts-essiv:sha256",
                "cbc-plain64",
                "cbc-essiv:sha256",
            ] {
                let one = suite(name, mode);
                let key = [0x5a; 64];
                let key = &key[..if one.mode == Mode::Xts { 64 } else { 32 }];
                let cipher = one.with_key(key).expect("a key");
                let first = u64::from(u32::MAX) - 4;
                let mut whole = plain.clone();
                cipher.encrypt(first, &mut whole);
                let mut parts = plain.clone();
                for (n, sector) in parts.chunks_mut(512).enumerate() {
                    cipher.encrypt(first + n as u64, sector);
                }
                assert!(whole == parts, "{name} {mode}");
                let cut = 512 * 3;
                cipher.decrypt(first, &mut whole[..cut]);
                cipher.decrypt(first + 3, &mut whole[cut..]);
                assert!(whole == plain, "{name} {mode}");
            }
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (name, mode, said) in [
            ("cast5", "cbc-plain", "cast5"),
            ("aes", "ecb-plain", "ecb"),
            ("aes", "xts", "xts"),
            ("aes", "cbc-benbi", "benbi"),
            ("aes", "cbc-essiv", "essiv"),
            ("aes", "cbc-essiv:sha1", "essiv"),
            ("aes", "cbc-essiv:md5", "md5"),
        ] {
            let error = Suite::parse(name, mode).expect_err("refused");
            assert!(error.message().contains(said), "{error}");
        }
        let error = suite("aes", "xts-plain64").with_key(&[0; 30]).map(|_| ());
        assert!(error.expect_err("refused").message().contains("120 bits"));
    }
}
