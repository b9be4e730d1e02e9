// SPDX-License-Identifier: Apache-2.0
//! Threads that expand compressed clusters and encrypt and decrypt for a machine's disks, so that one queue may use more
//! than one processor ([`vmbus_qcow2::Pool`] says who does what when).
//!
//! They are made when the machine is built, since none is later, and sleep until several such requests wait at once. No
//! more than the machine has vCPUs, nor than processors are left besides the I/O thread's; none on one processor, and
//! none for a machine whose disks are all raw (a disk in another format that is plugged in later then has its I/O
//! thread only). They make no system calls but to sleep, to wake others and for memory.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmbus_qcow2::Pool;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::thread::{spawn, Role, ThreadHook};

/// The most of them.
const MOST: usize = 15;

/// The threads. Stopping or dropping this ends them.
pub(crate) struct Coders {
    pool: Arc<Pool>,
    threads: Mutex<Vec<JoinHandle<Result<()>>>>,
}

impl Coders {
    /// Threads for a machine with so many vCPUs; None where there would be none.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no thread.
    pub(crate) fn new(vcpus: u8, hook: &ThreadHook) -> Result<Option<Coders>> {
        let count = processors().saturating_sub(1);
        let count = count.min(usize::from(vcpus)).min(MOST);
        if count == 0 {
            return Ok(None);
        }
        let all = Coders {
            pool: Pool::new(),
            threads: Mutex::default(),
        };
        for index in 0..count {
            let pool = all.pool.clone();
            let thread = spawn(&format!("coder-{index}"), Role::Memory, hook, move || {
                pool.work();
            })?;
            all.lock().push(thread);
        }
        Ok(Some(all))
    }

    /// What an engine is given.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<Result<()>>>> {
        self.threads.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Device for Coders {
    fn id(&self) -> String {
        "coders".to_owned()
    }

    fn stop(&self) -> Result<()> {
        self.pool.close();
        let threads = std::mem::take(&mut *self.lock());
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| {
                Err(Error::internal(
                    "a thread that expands or encrypts panicked",
                ))
            })
        })
    }
}

impl Drop for Coders {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Processors that this process may run on.
fn processors() -> usize {
    // SAFETY: all bytes zero is a set without processors.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as large as is said, and is written to.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    if result != 0 {
        // More than a set has room for.
        return MOST + 1;
    }
    // SAFETY: it only reads the set.
    unsafe { libc::CPU_COUNT(&set) }.max(1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::unconfined;

    #[test]
    fn there_are_no_more_than_vcpus_and_other_processors_and_they_end() {
        for vcpus in [1, 2, 200] {
            let coders = Coders::new(vcpus, &unconfined()).unwrap();
            let count = coders.as_ref().map_or(0, |all| all.lock().len());
            assert_eq!(count, usize::from(vcpus).min(processors() - 1).min(MOST));
            if let Some(coders) = coders {
                coders.stop().unwrap();
                assert_eq!(coders.lock().len(), 0);
            }
        }
    }

    #[test]
    fn a_thread_that_may_not_be_narrowed_means_none() {
        let refused: ThreadHook = Arc::new(|_| Err(Error::internal("no filter")));
        if processors() > 1 {
            assert!(Coders::new(2, &refused).is_err());
        }
    }
}
