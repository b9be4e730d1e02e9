// SPDX-License-Identifier: Apache-2.0
//! How a device tells its driver something: by the MSI-X vectors that the driver chose, and in the ISR
//! status for one that polls (virtio 1.2, 4.1.5.3).

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU8, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::pci::msix::Vectors;
use crate::state::{self, State, Stateful};

/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    isr: u8,
    config: u16,
    queues: Vec<u16>,
    broken: bool,
}

impl Stateful for Interrupt {
    fn save(&self) -> Result<State> {
        state::write(&Saved {
            isr: self.isr.load(Ordering::Acquire),
            config: self.config_vector(),
            queues: (0..self.queues.len())
                .map(|index| self.queue_vector(index as u16))
                .collect(),
            broken: self.is_broken(),
        })
    }

    fn restore(&self, state: &State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        if saved.queues.len() != self.queues.len() {
            return Err(state::invalid("another number of queues"));
        }
        self.isr
            .store(saved.isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
        self.set_config_vector(saved.config);
        for (index, vector) in (0u16..).zip(&saved.queues) {
            self.set_queue_vector(index, *vector);
        }
        self.broken.store(saved.broken, Ordering::Release);
        Ok(())
    }
}

/// One device's interrupts, shared by its registers and the thread that serves it.
pub struct Interrupt {
    vectors: Arc<Vectors>,
    count: u16,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    broken: AtomicBool,
}

impl Interrupt {
    /// No vector is chosen yet; `count` vectors exist.
    pub fn new(vectors: Arc<Vectors>, count: u16, queues: u16) -> Interrupt {
        Interrupt {
            vectors,
            count,
            isr: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            broken: AtomicBool::new(false),
        }
    }

    /// Requests of queue `index` have been used.
    pub fn used(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.vectors.raise(self.queue_vector(index));
    }

    /// The device-specific configuration has changed.
    pub fn configured(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.vectors.raise(self.config_vector());
    }

    /// The driver broke the rules: DEVICE_NEEDS_RESET is set and the driver told (2.1.2).
    pub fn fail(&self) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.vectors.raise(self.config_vector());
        }
    }

    /// Whether the device needs a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The ISR status, which reading clears.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The vector for configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    /// The driver chooses it; one that does not exist becomes "none" (4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::Release);
    }

    /// The vector of queue `index`.
    pub fn queue_vector(&self, index: u16) -> u16 {
        let vector = self.queues.get(usize::from(index));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// The driver chooses it.
    pub fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(place) = self.queues.get(usize::from(index)) {
            place.store(self.existing(vector), Ordering::Release);
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
        self.config.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.count {
            vector
        } else {
            NO_VECTOR
        }
    }
}
