// SPDX-License-Identifier: Apache-2.0
//! libFuzzer on the NBD server: vmbus_fuzz::nbd.
#![no_main]

use vmbus_fuzz::memory::Counting;

#[global_allocator]
static MEMORY: Counting = Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::nbd::run(data));
