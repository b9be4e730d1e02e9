// SPDX-License-Identifier: Apache-2.0
//! What devices hold of a machine: KVM's VM, the guest's memory, the two buses and the interrupt routes.
//!
//! Everything here is shared (`Arc`) and outlives every device, so a device thread needs no reference to
//! the machine itself.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::bus::Bus;
use crate::irq::Routing;
use crate::memory::GuestMemoryMmap;
use crate::slots::Slots;

/// A VM and its address spaces.
#[derive(Clone)]
pub struct Vm {
    /// KVM's VM.
    pub fd: Arc<VmFd>,
    /// The guest's RAM.
    pub memory: Arc<GuestMemoryMmap>,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O: whatever is not RAM.
    pub mmio: Arc<Bus>,
    /// Interrupt routes.
    pub irq: Arc<Routing>,
    /// Where the guest finds RAM and ROM.
    pub slots: Arc<Slots>,
}

impl Vm {
    /// Wraps a VM that has nothing yet: no memory, no irqchip.
    pub fn new(fd: VmFd, memory: GuestMemoryMmap) -> Vm {
        let fd = Arc::new(fd);
        Vm {
            memory: Arc::new(memory),
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            irq: Arc::new(Routing::new(Arc::clone(&fd))),
            slots: Arc::new(Slots::new(Arc::clone(&fd))),
            fd,
        }
    }
}
