// SPDX-License-Identifier: Apache-2.0
//! The vCPUs' threads, as the control thread has them.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::cpu::gate::Gate;
use crate::cpu::run::{Counters, Vcpu};
use crate::error::Result;
use crate::thread::{self, Role, ThreadHook};

/// The vCPUs' threads; dropping this sends all of them home.
pub(crate) struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<Result<Vcpu>>>,
    pub(super) counters: Vec<Arc<Counters>>,
}

impl VcpuThreads {
    pub(crate) fn start(gate: Arc<Gate>, vcpus: Vec<Vcpu>, hook: &ThreadHook) -> Result<Self> {
        let mut all = VcpuThreads {
            gate,
            threads: Vec::new(),
            counters: Vec::new(),
        };
        for vcpu in vcpus {
            all.counters.push(Arc::clone(&vcpu.counters));
            let name = format!("vcpu-{}", vcpu.index);
            let thread = thread::spawn(&name, Role::Vcpu, hook, move || vcpu.run())?;
            all.threads.push(thread);
        }
        Ok(all)
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.gate.end();
        // No vCPU is dropped before the last thread is home: until then, each may be kicked.
        let vcpus: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        drop(vcpus);
    }
}
