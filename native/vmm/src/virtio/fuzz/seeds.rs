// SPDX-License-Identifier: Apache-2.0
//! How often and how long: the first seeds are always the same; with FUZZ_SECONDS in the environment new ones follow for so
//! long. A test that hangs fails a minute after that.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seeds 1 to `fixed`, then others while there is time.
pub(crate) fn seeds(fixed: u64) -> impl Iterator<Item = u64> {
    let deadline = Instant::now() + extra_time();
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = since_1970.as_nanos() as u64 | 1 << 63;
    (1..=fixed).chain((first..).take_while(move |_| Instant::now() < deadline))
}

/// Runs a test that may come to hang.
pub(crate) fn within_a_minute(test: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = channel::<()>();
    let thread = std::thread::spawn(move || {
        let _sender = sender;
        test();
    });
    let limit = Duration::from_secs(60) + extra_time();
    let ended = receiver.recv_timeout(limit);
    assert_eq!(ended, Err(RecvTimeoutError::Disconnected), "it hangs");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What FUZZ_SECONDS grants beyond the fixed seeds.
fn extra_time() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(0))
}
