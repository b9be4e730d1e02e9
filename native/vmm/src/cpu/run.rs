// SPDX-License-Identifier: Apache-2.0
//! The thread that runs one vCPU.
//!
//! The loop is KVM_RUN, a look at the exit reason, a look-up on a bus. Nothing is checked on the way that KVM
//! does not already say: orders arrive as EINTR (see `gate.rs`). An exit that means the end is raised at the
//! gate; the thread then waits there for orders like any other.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_run, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
};
use kvm_ioctls::VcpuFd;

use crate::bus::Bus;
use crate::cpu::entry::Entry;
use crate::cpu::gate::{Cause, Errand, Gate, Order};
use crate::cpu::reset::{Firmware, ResetState};
use crate::cpu::state::VcpuState;
use crate::error::{Error, Result};
use crate::thread::panic_message;

/// What one vCPU did since it was made. Written by its own thread only.
#[derive(Default)]
pub struct Counters {
    /// Exits to user space.
    pub exits: AtomicU64,
    /// Of these, port accesses.
    pub pio: AtomicU64,
    /// Of these, MMIO accesses.
    pub mmio: AtomicU64,
}

fn count(counter: &AtomicU64) {
    // One writer: no locked instruction is needed.
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(1),
        Ordering::Relaxed,
    );
}

/// One vCPU and all it touches.
pub struct Vcpu {
    /// Its number, and its APIC id.
    pub index: usize,
    /// KVM's vCPU.
    pub fd: VcpuFd,
    /// What it has after a reset.
    pub reset: ResetState,
    /// Its CPUID promises that the time stamp counter keeps its frequency.
    pub invariant_tsc: bool,
    /// Where the boot processor begins; changed by the boot code while all vCPUs stand.
    pub entry: Arc<Mutex<Option<Entry>>>,
    /// Where what it remembers is written down, and taken over from with the nanoseconds that have passed since.
    pub saved: Arc<Mutex<Option<(VcpuState, u64)>>>,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Orders and causes.
    pub gate: Arc<Gate>,
    /// Statistics.
    pub counters: Arc<Counters>,
}

impl Vcpu {
    /// Runs until the End order. The vCPU is given back: it is to be dropped after all threads were joined,
    /// because others hold a pointer into it (see [`Gate::enter`]).
    pub fn run(mut self) -> Vcpu {
        let immediate_exit: *mut u8 = &mut self.fd.get_kvm_run().immediate_exit;
        let gate = Arc::clone(&self.gate);
        // SAFETY: the mapping lives as long as the vCPU, which outlives this thread.
        unsafe { gate.enter(self.index, immediate_exit) };
        let mut errands = 0;
        loop {
            // Before the order is read, so that a kick that comes in between is not lost.
            // SAFETY: as above; the byte is only ever accessed atomically or by the kernel.
            unsafe { (*immediate_exit.cast::<AtomicU8>()).store(0, Ordering::SeqCst) };
            match gate.wait(&mut errands) {
                Order::Run => {
                    // After a pause the guest's watchdogs must not take the gap for a lock-up. A guest without
                    // a kvmclock has none to be told (EINVAL).
                    let _ = self.fd.kvmclock_ctrl();
                    // A bug in a device's register ends the machine, not the process, and not this
                    // thread, for which others wait at the gate.
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.run_guest())) {
                        gate.raise(Cause::Error(panic_message(panic.as_ref())));
                    }
                }
                Order::Errand(errand) => gate.has_done(match errand {
                    Errand::Reset => self.reset(),
                    Errand::Save => self.save(),
                    Errand::Restore => self.restore(),
                }),
                Order::Stand => {}
                Order::End => return self,
            }
        }
    }

    fn save(&self) -> Result<()> {
        let state = VcpuState::read(&self.fd, self.reset.msrs())?;
        *self.saved.lock().unwrap_or_else(|e| e.into_inner()) = Some((state, 0));
        Ok(())
    }

    fn restore(&self) -> Result<()> {
        let saved = self.saved.lock().unwrap_or_else(|e| e.into_inner()).take();
        let (state, passed) = saved.ok_or_else(|| Error::internal("nothing to restore"))?;
        state.write(&self.fd, passed, self.invariant_tsc)
    }

    fn reset(&mut self) -> Result<()> {
        let entry = *self.entry.lock().unwrap_or_else(|e| e.into_inner());
        let firmware = match entry {
            Some(Entry::Reset) => Firmware::Ahead,
            _ => Firmware::Done,
        };
        let entry = entry.filter(|_| self.index == 0);
        self.reset.restore(&self.fd, entry.as_ref(), firmware)
    }

    /// Returns when KVM_RUN was interrupted.
    fn run_guest(&mut self) {
        loop {
            if let Err(error) = self.fd.run() {
                match error.errno() {
                    libc::EINTR => return,
                    // A vCPU that waited for SIPI has got it.
                    libc::EAGAIN => continue,
                    _ => {
                        self.gate.raise(Cause::Error(format!(
                            "KVM_RUN of vCPU {}: {error}",
                            self.index
                        )));
                        return;
                    }
                }
            }
            count(&self.counters.exits);
            let run = self.fd.get_kvm_run();
            match run.exit_reason {
                KVM_EXIT_IO => {
                    count(&self.counters.pio);
                    port_access(run, &self.pio);
                }
                KVM_EXIT_MMIO => {
                    count(&self.counters.mmio);
                    mmio_access(run, &self.mmio);
                }
                KVM_EXIT_INTR => {}
                reason => {
                    let cause = self.cause(reason);
                    self.gate.raise(cause);
                    return;
                }
            }
        }
    }

    fn cause(&mut self, reason: u32) -> Cause {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let at = format!("vCPU {} at rip {rip:#x}", self.index);
        let run = self.fd.get_kvm_run();
        match reason {
            KVM_EXIT_SHUTDOWN => Cause::TripleFault,
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: the exit reason says that this is the union's live field; all its bits are valid.
                let internal = unsafe { run.__bindgen_anon_1.internal };
                let data: Vec<String> = internal
                    .data
                    .iter()
                    .take(internal.ndata as usize)
                    .map(|word| format!("{word:#x}"))
                    .collect();
                Cause::KvmInternalError(format!(
                    "{at}: suberror {} ({}), data [{}]",
                    internal.suberror,
                    suberror(internal.suberror),
                    data.join(", ")
                ))
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let entry = unsafe { run.__bindgen_anon_1.fail_entry };
                Cause::KvmInternalError(format!(
                    "{at}: the hardware refused the entry, reason {:#x}",
                    entry.hardware_entry_failure_reason
                ))
            }
            reason => Cause::Error(format!("{at}: KVM exit {reason} is not known")),
        }
    }
}

/// KVM_INTERNAL_ERROR_* of include/uapi/linux/kvm.h.
fn suberror(number: u32) -> &'static str {
    match number {
        1 => "instruction emulation failed",
        2 => "simultaneous exceptions",
        3 => "exit while an event was delivered",
        4 => "unexpected exit reason",
        _ => "not known",
    }
}

/// One exit may carry several accesses to one port (a string instruction).
fn port_access(run: &mut kvm_run, bus: &Bus) {
    // SAFETY: the exit reason says that this is the union's live field.
    let io = unsafe { run.__bindgen_anon_1.io };
    let len = usize::from(io.size).saturating_mul(io.count as usize);
    let start = (run as *mut kvm_run).cast::<u8>();
    // SAFETY: KVM says that `len` bytes at `data_offset` lie in the mapping that `run` begins; nothing else
    // refers to them while the vCPU is out of KVM_RUN.
    let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), len) };
    for access in data.chunks_mut(usize::from(io.size.max(1))) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            bus.write(u64::from(io.port), access);
        } else {
            bus.read(u64::from(io.port), access);
        }
    }
}

fn mmio_access(run: &mut kvm_run, bus: &Bus) {
    // SAFETY: the exit reason says that this is the union's live field.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let Some(data) = mmio.data.get_mut(..mmio.len as usize) else {
        return;
    };
    if mmio.is_write != 0 {
        bus.write(mmio.phys_addr, data);
    } else {
        bus.read(mmio.phys_addr, data);
    }
}
