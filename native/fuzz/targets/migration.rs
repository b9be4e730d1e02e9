// SPDX-License-Identifier: Apache-2.0
//! libFuzzer on what a migration's destination takes in: vmbus_fuzz::migration.
#![no_main]

use vmbus_fuzz::memory::Counting;

#[global_allocator]
static MEMORY: Counting = Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::migration::run(data));
