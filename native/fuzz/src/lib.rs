// SPDX-License-Identifier: Apache-2.0
//! What the fuzz targets check, one module a target: bytes in, a panic when a property is broken.
//!
//! | module   | job                                                                    |
//! |----------|------------------------------------------------------------------------|
//! | `image`  | a damaged image, and what is done to it                                |
//! | `nbd`    | what a hostile client sends to the server                              |
//! | `migration` | what a hostile source sends to a machine that is received            |
//! | –        | a LUKS header: `vmbus_qcow2::fuzz_luks_header`                         |
//! | `input`  | numbers out of libFuzzer's bytes                                       |
//! | `memory` | an allocator that counts: memory is bounded whatever the input says    |
//! | `disk`   | images in memory                                                       |
//!
//! The programs in targets/ put libFuzzer in front of them, with the flags in .cargo/config.toml.
//! `corpus/` holds inputs that reach far, `regressions/` those that once broke something; each run
//! begins with all of both.

pub mod disk;
pub mod image;
pub mod input;
pub mod memory;
pub mod migration;
pub mod nbd;
