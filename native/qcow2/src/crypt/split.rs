// SPDX-License-Identifier: Apache-2.0
//! The anti-forensic splitter (LUKS 1.2.1, "AF splitter"): a key blown up to many stripes of its own
//! length, all of which are needed to get it back, so that wiping any of them destroys it.

use zeroize::Zeroizing;

use super::hash::Hash;

/// `key` as stripes, one for each key's length in `random` (random bytes) and a last one behind.
pub(crate) fn split(hash: Hash, key: &[u8], random: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut stripes = Zeroizing::new(random.to_vec());
    let mut last = fold(hash, key.len(), random);
    xor(&mut last, key);
    stripes.extend_from_slice(&last);
    stripes
}

/// The key of `len` bytes out of its stripes.
pub(crate) fn join(hash: Hash, len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let (most, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = fold(hash, len, most);
    xor(&mut key, last);
    key
}

fn fold(hash: Hash, len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut folded = Zeroizing::new(vec![0u8; len]);
    for stripe in stripes.chunks(len.max(1)) {
        xor(&mut folded, stripe);
        diffuse(hash, &mut folded);
    }
    folded
}

/// Each digest's length of `block` becomes the hash of its number and itself; the last is cut.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (n, part) in block.chunks_mut(hash.len()).enumerate() {
        let digest = Zeroizing::new(hash.digest(&[&(n as u32).to_be_bytes(), part]));
        if let Some(digest) = digest.get(..part.len()) {
            part.copy_from_slice(digest);
        }
    }
}

fn xor(block: &mut [u8], other: &[u8]) {
    block
        .iter_mut()
        .zip(other)
        .for_each(|(one, two)| *one ^= two);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_only_from_all_stripes() {
        let key: Vec<u8> = (0..64).collect();
        let random: Vec<u8> = (0..64 * 99u32).map(|n| ((n * 31) >> 3) as u8).collect();
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            let mut stripes = split(hash, &key, &random);
            assert_eq!(stripes.len(), 64 * 100);
            assert_eq!(*join(hash, 64, &stripes), key);
            stripes[64 * 50] ^= 1;
            assert_ne!(*join(hash, 64, &stripes), key);
        }
    }
}
