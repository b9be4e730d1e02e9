// SPDX-License-Identifier: Apache-2.0
//! The gate between the control thread and the vCPU threads.
//!
//! The control thread gives an order; every vCPU thread follows it at the gate. A vCPU inside KVM_RUN is
//! brought there by `immediate_exit` and a signal. Both are needed, and together have no gap:
//!
//! | where the vCPU is | what stops it |
//! |---|---|
//! | in the guest, or asleep in HLT | the signal: KVM_RUN returns EINTR |
//! | in user space, anywhere before KVM_RUN | `immediate_exit`: KVM_RUN returns EINTR at once |
//!
//! KVM_RUN completes a pending port or MMIO access before it looks at `immediate_exit`, so a vCPU that stands
//! at the gate has no access half done, and its registers may be read and set.
//!
//! | order | what a vCPU thread does |
//! |---|---|
//! | Stand | waits |
//! | Run | leaves the gate and runs the guest, but not while it is held ([`Gate::hold`]) |
//! | Errand | resets, saves or restores its vCPU, once, then waits |
//! | End | returns |
//!
//! A vCPU that finds that the machine is at an end (power off, triple fault) calls [`Gate::raise`]: the order
//! becomes Stand at once, so no other vCPU runs far, and the cause goes to the control thread's queue.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};

/// A vCPU that does not come to the gate within this time is a bug of the kernel's or of ours.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often a laggard is kicked again.
const AGAIN: Duration = Duration::from_millis(100);

/// Why the guest does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// PM1a_CNT: sleep state S5.
    PowerOff,
    /// The guest pulled the reset line; by which means.
    Reset(&'static str),
    /// The guest's kernel says that it has panicked.
    GuestPanic,
    /// KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR or KVM_EXIT_FAIL_ENTRY.
    KvmInternalError(String),
    /// A device found the guest's driver to be beyond repair.
    GuestMisbehaved(String),
    /// A disk failed in a way that the guest cannot be told.
    IoError(String),
    /// Anything else that KVM_RUN said.
    Error(String),
}

/// Where causes go: a queue that the control thread reads.
pub type Sink = Arc<dyn Fn(Cause, u64) + Send + Sync>;

/// What each vCPU thread does once, while all stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Put the vCPU into its reset state.
    Reset,
    /// Write down what it remembers.
    Save,
    /// Take over what another one remembered.
    Restore,
}

/// What the control thread wants of all vCPU threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Wait at the gate.
    Stand,
    /// Run the guest.
    Run,
    /// Do this, then wait.
    Errand(Errand),
    /// Leave for ever.
    End,
}

struct State {
    order: Order,
    /// Threads that wait at the gate.
    standing: usize,
    /// Threads that have yet to do the present errand.
    busy: usize,
    /// Why an errand failed, if one did.
    failure: Option<Error>,
    /// Numbers errands.
    errands: u64,
    /// How many of them were resets.
    epoch: u64,
    /// Until then, Run is not followed.
    held_until: Option<Instant>,
}

/// How a vCPU thread is brought out of KVM_RUN.
struct Kick {
    /// `kvm_run.immediate_exit`; null until the thread has entered.
    immediate_exit: AtomicPtr<u8>,
    /// pthread_t.
    thread: AtomicU64,
}

/// One for a machine.
pub struct Gate {
    state: Mutex<State>,
    /// The order or the numbers in `state` changed.
    changed: Condvar,
    kicks: Vec<Kick>,
    sink: Sink,
}

impl Gate {
    /// A gate for `vcpus` threads, closed (Stand).
    pub fn new(vcpus: usize, sink: Sink) -> Gate {
        Gate {
            state: Mutex::new(State {
                order: Order::Stand,
                standing: 0,
                busy: 0,
                failure: None,
                errands: 0,
                epoch: 0,
                held_until: None,
            }),
            changed: Condvar::new(),
            kicks: (0..vcpus)
                .map(|_| Kick {
                    immediate_exit: AtomicPtr::new(std::ptr::null_mut()),
                    thread: AtomicU64::new(0),
                })
                .collect(),
            sink,
        }
    }

    /// The calling thread is vCPU `index`, and this is where its `immediate_exit` lies.
    ///
    /// # Safety
    /// The pointer stays valid until the gate is dropped or the thread was given the End order by
    /// [`Gate::end`], and the thread is not detached.
    pub unsafe fn enter(&self, index: usize, immediate_exit: *mut u8) {
        if let Some(kick) = self.kicks.get(index) {
            // SAFETY: no precondition.
            let thread = unsafe { libc::pthread_self() };
            kick.thread.store(thread as u64, Ordering::Release);
            kick.immediate_exit.store(immediate_exit, Ordering::Release);
        }
    }

    /// Called by a vCPU thread whenever KVM_RUN was interrupted: waits until there is an order to follow.
    ///
    /// `done` is the thread's own note of the last errand that it did.
    pub fn wait(&self, done: &mut u64) -> Order {
        let mut state = self.lock();
        state.standing = state.standing.saturating_add(1);
        self.changed.notify_all();
        loop {
            let mut time = DEADLINE;
            let held = state
                .held_until
                .map(|end| end.saturating_duration_since(Instant::now()));
            match state.order {
                Order::Stand => {}
                Order::Errand(_) if state.errands == *done => {}
                Order::Run if held.is_some_and(|left| !left.is_zero()) => {
                    time = held.unwrap_or(time);
                }
                order => {
                    if let Order::Errand(_) = order {
                        *done = state.errands;
                    }
                    state.standing = state.standing.saturating_sub(1);
                    return order;
                }
            }
            state = self.sleep(state, time);
        }
    }

    /// Called by a vCPU thread that has done its errand.
    pub fn has_done(&self, result: Result<()>) {
        let mut state = self.lock();
        state.busy = state.busy.saturating_sub(1);
        if let Err(error) = result {
            state.failure.get_or_insert(error);
        }
        self.changed.notify_all();
    }

    /// The guest does not go on: all vCPUs are called to the gate and the control thread is told. For any thread
    /// but the control thread; does not wait.
    pub fn raise(&self, cause: Cause) {
        let mut state = self.lock();
        // A device may raise after the control thread has called everybody; that stays the order.
        if state.order == Order::Run {
            state.order = Order::Stand;
        }
        let epoch = state.epoch;
        drop(state);
        self.kick();
        (self.sink)(cause, epoch);
    }

    /// How many resets there were; a cause of an older epoch is stale.
    pub fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// Calls all vCPUs to the gate and waits until they stand there.
    ///
    /// # Errors
    /// `Internal` when one does not come within 30 s.
    pub fn stand(&self) -> Result<()> {
        self.lock().order = Order::Stand;
        self.await_state("stand still", |state| state.standing == self.kicks.len())
    }

    /// Holds them back for a while if they run: a migration slows them. Never waits.
    pub fn hold(&self, time: Duration) {
        self.lock().held_until = Instant::now().checked_add(time);
        self.kick();
    }

    /// Lets them go. They must stand.
    pub fn run(&self) {
        self.lock().order = Order::Run;
        self.changed.notify_all();
    }

    /// Has each thread reset its vCPU, and waits until all have. They must stand, and stand again afterwards.
    ///
    /// # Errors
    /// What the first failing thread said.
    pub fn reset(&self) -> Result<()> {
        let mut state = self.lock();
        state.epoch = state.epoch.wrapping_add(1);
        drop(state);
        self.errand(Errand::Reset)
    }

    /// Has each thread do an errand, and waits until all have. They must stand, and stand again afterwards.
    ///
    /// # Errors
    /// What the first failing thread said.
    pub fn errand(&self, errand: Errand) -> Result<()> {
        {
            let mut state = self.lock();
            state.order = Order::Errand(errand);
            state.errands = state.errands.wrapping_add(1);
            state.busy = self.kicks.len();
            state.failure = None;
            self.changed.notify_all();
        }
        self.await_state("have done their errand", |state| {
            state.busy == 0 && state.standing == self.kicks.len()
        })?;
        let mut state = self.lock();
        state.order = Order::Stand;
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Sends all threads home; they are then to be joined.
    pub fn end(&self) {
        self.lock().order = Order::End;
        self.kick();
        self.changed.notify_all();
    }

    fn await_state(&self, what: &str, done: impl Fn(&State) -> bool) -> Result<()> {
        let begin = Instant::now();
        self.kick();
        let mut state = self.lock();
        while !done(&state) {
            if begin.elapsed() > DEADLINE {
                return Err(Error::new(
                    Kind::Internal,
                    "",
                    format!(
                        "of {} vCPUs only {} {what} after {DEADLINE:?}",
                        self.kicks.len(),
                        state.standing
                    ),
                ));
            }
            let before = Instant::now();
            state = self.sleep(state, AGAIN);
            if before.elapsed() >= AGAIN {
                drop(state);
                self.kick();
                state = self.lock();
            }
        }
        Ok(())
    }

    fn kick(&self) {
        for kick in &self.kicks {
            let immediate_exit = kick.immediate_exit.load(Ordering::Acquire);
            if immediate_exit.is_null() {
                continue;
            }
            // SAFETY: `enter` promises that the pointer is valid; the kernel reads the byte at entry, and
            // other threads only store to it.
            unsafe {
                (*immediate_exit.cast::<std::sync::atomic::AtomicU8>()).store(1, Ordering::SeqCst);
            }
            // SAFETY: the thread has entered and is joined only after `end`, so the id is alive; the
            // signal's handler does nothing.
            unsafe { libc::pthread_kill(kick.thread.load(Ordering::Acquire) as _, kick_signal()) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn sleep<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed
            .wait_timeout(state, time)
            .unwrap_or_else(|e| e.into_inner())
            .0
    }
}

/// The signal that interrupts KVM_RUN.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Gives that signal a handler that does nothing, so that it interrupts and does not kill.
///
/// # Errors
/// `Unavailable` when the kernel refuses.
pub fn install_kick_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zeroes is a valid sigaction: an empty mask, no flags (no SA_RESTART: KVM_RUN must return).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler touches nothing, so it may run anywhere.
    match unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(Error::kernel("sigaction", std::io::Error::last_os_error())),
    }
}
