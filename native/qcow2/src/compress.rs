// SPDX-License-Identifier: Apache-2.0
//! Compressed clusters: raw deflate with a window of 4 KiB (what QEMU's inflateInit2(-12) takes)
//! and zstd frames. What is read comes from an image and may be anything: the output is bounded
//! by the cluster size, and so is zstd's window.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::error::{Error, Result};
use crate::plan::Codec;

/// Expand `packed` (which may have bytes after its end: sizes are stored in sectors) to exactly
/// `size` bytes.
pub(crate) fn expand(codec: Codec, packed: &[u8], size: usize) -> Result<Vec<u8>> {
    let mut cluster = vec![0u8; size];
    let produced = match codec {
        Codec::Zlib => inflate(packed, &mut cluster),
        Codec::Zstd => unzstd(packed, &mut cluster),
    };
    match produced {
        Some(count) if count == size => Ok(cluster),
        _ => Err(Error::invalid(format!(
            "a compressed cluster does not expand to {size} bytes"
        ))),
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> Option<usize> {
    let mut inflater = Decompress::new(false);
    let status = inflater
        .decompress(packed, cluster, FlushDecompress::Finish)
        .ok()?;
    // A full buffer is enough: QEMU takes a stream without its end mark, too.
    (status == Status::StreamEnd || inflater.total_out() == cluster.len() as u64)
        .then(|| inflater.total_out() as usize)
}

fn unzstd(packed: &[u8], cluster: &mut [u8]) -> Option<usize> {
    // One frame; what follows it is the padding to a sector.
    let frame = zstd::zstd_safe::find_frame_compressed_size(packed).ok()?;
    zstd::bulk::Decompressor::new()
        .ok()?
        .decompress_to_buffer(packed.get(..frame)?, cluster)
        .ok()
}

/// A compressor that is used again and again: making one costs more than packing a cluster.
pub(crate) enum Packer {
    Zlib(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    pub(crate) fn new(codec: Codec) -> Result<Packer> {
        Ok(match codec {
            Codec::Zlib => Packer::Zlib(Compress::new_with_window_bits(
                Compression::default(),
                false,
                12,
            )),
            Codec::Zstd => {
                let packer = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL);
                Packer::Zstd(packer.map_err(|e| Error::io("set up zstd", &e))?)
            }
        })
    }

    /// Compress a whole cluster; None when that does not make it smaller.
    pub(crate) fn pack(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        // Room for what grows, too: a deflater that is left with output pending must not be used again.
        let mut packed = vec![0u8; cluster.len() + cluster.len() / 256 + 64];
        let len = match self {
            Packer::Zlib(deflater) => {
                deflater.reset();
                match deflater
                    .compress(cluster, &mut packed, FlushCompress::Finish)
                    .ok()?
                {
                    Status::StreamEnd => deflater.total_out() as usize,
                    _ => return None,
                }
            }
            // An error means that the result does not fit.
            Packer::Zstd(packer) => packer.compress_to_buffer(cluster, &mut packed).ok()?,
        };
        packed.truncate(len);
        (len < cluster.len()).then_some(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        (0..65536u32)
            .map(|n| (n / 97) as u8 ^ (n % 7) as u8)
            .collect()
    }

    #[test]
    fn what_is_packed_expands_again_with_padding_behind() {
        for codec in [Codec::Zlib, Codec::Zstd] {
            let mut packed = Packer::new(codec)
                .map(|mut packer| packer.pack(&sample()))
                .expect("a packer")
                .expect("it shrinks");
            packed.resize(packed.len() + 300, 0xaa);
            assert_eq!(expand(codec, &packed, 65536).expect("it expands"), sample());
        }
    }

    #[test]
    fn a_packer_works_on_after_noise_that_does_not_shrink() {
        for codec in [Codec::Zlib, Codec::Zstd] {
            let mut packer = Packer::new(codec).expect("a packer");
            let mut state = 1u64;
            for _ in 0..200 {
                let noise: Vec<u8> = std::iter::repeat_with(|| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 56) as u8
                })
                .take(16384)
                .collect();
                assert!(packer.pack(&noise).is_none());
            }
            let packed = packer.pack(&sample()).expect("it shrinks");
            assert_eq!(expand(codec, &packed, 65536).expect("it expands"), sample());
        }
    }

    #[test]
    fn noise_and_wrong_sizes_are_errors() {
        for codec in [Codec::Zlib, Codec::Zstd] {
            let packed = Packer::new(codec)
                .map(|mut packer| packer.pack(&sample()))
                .expect("a packer")
                .expect("it shrinks");
            assert!(expand(codec, &packed, 131_072).is_err());
            let half = packed.get(..packed.len() / 2).expect("half");
            assert!(expand(codec, half, 65536).is_err());
            assert!(expand(codec, &[0xff; 512], 65536).is_err());
        }
    }
}
