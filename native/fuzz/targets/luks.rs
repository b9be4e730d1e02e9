// SPDX-License-Identifier: Apache-2.0
//! libFuzzer on LUKS headers: vmbus_qcow2::fuzz_luks_header.
#![no_main]

use vmbus_fuzz::memory::Counting;

#[global_allocator]
static MEMORY: Counting = Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_qcow2::fuzz_luks_header(data));
