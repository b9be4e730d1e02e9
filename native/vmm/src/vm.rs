// SPDX-License-Identifier: Apache-2.0
//! What devices hold of a machine: KVM's VM, the guest's memory, the two buses and the interrupt routes.
//!
//! Everything here is shared (`Arc`) and outlives every device, so a device thread needs no reference to
//! the machine itself.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::irq::Routing;

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
}

impl Vm {
    /// Wraps a VM whose irqchip exists and whose memory is registered.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses the interrupt routes.
    pub fn new(fd: VmFd, memory: GuestMemoryMmap) -> Result<Vm> {
        let fd = Arc::new(fd);
        Ok(Vm {
            memory: Arc::new(memory),
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            irq: Arc::new(Routing::new(Arc::clone(&fd))?),
            fd,
        })
    }

    /// Has KVM count guest writes of any value and width at the MMIO address on `event`, without an exit.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses: the address is taken, or there are too many.
    pub fn register_ioeventfd(&self, event: &EventFd, address: u64) -> Result<()> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| Error::kernel("KVM_IOEVENTFD", e))
    }

    /// Takes that back.
    ///
    /// # Errors
    /// `Unavailable` when it was not registered.
    pub fn unregister_ioeventfd(&self, event: &EventFd, address: u64) -> Result<()> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| Error::kernel("KVM_IOEVENTFD (deassign)", e))
    }

    /// Has KVM raise `gsi` whenever `event` is written: an edge, as an MSI is.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|e| Error::kernel("KVM_IRQFD", e))
    }

    /// Takes that back.
    ///
    /// # Errors
    /// `Unavailable` when it was not registered.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(|e| Error::kernel("KVM_IRQFD (deassign)", e))
    }

    /// Raises or lowers a level-triggered pin of the I/O APIC, such as the SCI.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    pub fn set_irq_line(&self, gsi: u32, level: bool) -> Result<()> {
        self.fd
            .set_irq_line(gsi, level)
            .map_err(|e| Error::kernel("KVM_IRQ_LINE", e))
    }
}
