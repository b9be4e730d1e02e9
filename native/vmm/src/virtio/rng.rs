// SPDX-License-Identifier: Apache-2.0
//! virtio-rng (virtio 1.2, 5.4): random bytes from the host's getrandom(2).
//!
//! A request gets at most 4 KiB, whatever its size, which the specification allows: a guest cannot keep an I/O
//! thread busy with one. The host's generator never runs dry, so there is no rate to limit.

use super::chain::Chain;
use super::queue::Fault;
use super::{Model, F_RING};
use crate::memory::GuestMemoryMmap;

/// Bytes of one answer.
const ANSWER_MAX: usize = 4096;

/// What the guest sees.
pub fn model() -> Model {
    Model {
        device_type: 4,
        class: 0x00ff00,
        features: F_RING,
        queues: 1,
        queue_size: 64,
        config: Vec::new(),
        live: None,
    }
}

/// Fills a request; returns how many bytes were written.
///
/// # Errors
/// A [`Fault`] when there is nothing to write to, or it is not RAM.
pub fn answer(chain: &Chain, memory: &GuestMemoryMmap) -> Result<u32, Fault> {
    if chain.writable.is_empty() || !chain.readable.is_empty() {
        return Err(Fault::Request);
    }
    let mut bytes = [0; ANSWER_MAX];
    let len = chain.writable.len().min(ANSWER_MAX as u64) as usize;
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..len).filter(|rest| !rest.is_empty()) {
        // SAFETY: the pointer and the length are those of `rest`, which the kernel fills.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        // Interrupted by a signal before anything was copied: the only failure with these arguments.
        filled += usize::try_from(got).unwrap_or(0);
    }
    chain
        .writable
        .write(memory, bytes.get(..len).unwrap_or(&[]))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::queue::testing::{memory, rings, Driver};
    use super::super::queue::{Queue, RingFeatures};
    use super::*;

    fn ask(len: u32, flags: u16) -> (Result<u32, Fault>, Vec<u8>) {
        let memory = memory();
        let rings = rings(0, 8);
        let mut driver = Driver::new(memory.clone(), rings);
        let mut queue = Queue::new(memory.clone(), rings, RingFeatures::default()).unwrap();
        driver.descriptor(0, 0x8000, len, flags, 0);
        driver.offer(0);
        let chain = queue.pop().unwrap().unwrap();
        let answered = answer(&chain, &memory);
        let mut bytes = vec![0; 0x3000];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        (answered, bytes)
    }

    #[test]
    fn a_request_is_filled_and_no_more() {
        let (answered, bytes) = ask(64, 2);
        assert_eq!(answered.unwrap(), 64);
        assert!(bytes[..64].iter().any(|byte| *byte != 0));
        assert!(bytes[64..].iter().all(|byte| *byte == 0));
        assert_ne!(ask(64, 2).1, bytes);
    }

    #[test]
    fn one_answer_is_bounded() {
        let (answered, bytes) = ask(0x2000, 2);
        assert_eq!(answered.unwrap(), 4096);
        assert!(bytes[4096..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_request_to_read_from_is_a_fault() {
        assert!(ask(64, 0).0.is_err());
        assert!(ask(0, 2).0.is_err());
    }
}
