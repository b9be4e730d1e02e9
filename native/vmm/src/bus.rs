// SPDX-License-Identifier: Apache-2.0
//! An address space of devices: port I/O and memory-mapped I/O each have one.
//!
//! A range belongs to one device; a device may have several ranges. Ranges come and go while vCPUs run
//! (a guest moves a BAR), so a look-up takes the device out of the table before it calls it: a device may
//! insert and remove ranges, its own too, from within an access. What meets no range goes to the fallback,
//! if there is one. An access that no range holds whole, and the rest, reads all ones and writes nothing, as on a real
//! machine.

use std::sync::{Arc, RwLock};

use crate::error::{Error, Result};

/// Registers that a guest reads and writes. Calls come from several vCPU threads at once.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from the registers at `offset` within the range that begins at `base`.
    ///
    /// `data` is all ones beforehand; 1 to 8 bytes, never across the end of the range.
    fn read(&self, base: u64, offset: u64, data: &mut [u8]);

    /// The guest wrote `data` at `offset` within the range that begins at `base`.
    fn write(&self, base: u64, offset: u64, data: &[u8]);
}

struct Range {
    base: u64,
    /// The last address, inclusive: a range may end with the address space.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// The ranges of one address space, ordered by base, never overlapping.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
    fallback: RwLock<Option<Arc<dyn BusDevice>>>,
}

impl Bus {
    /// An address space without devices.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Gives `size` addresses from `base` to `device`.
    ///
    /// # Errors
    /// `InvalidArgument` if the range is empty, wraps around or meets another.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<()> {
        let last = size
            .checked_sub(1)
            .and_then(|extent| base.checked_add(extent))
            .ok_or_else(|| Error::invalid("", format!("no range: {size:#x} bytes at {base:#x}")))?;
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        let place = ranges.partition_point(|range| range.last < base);
        if let Some(next) = ranges.get(place).filter(|next| next.base <= last) {
            return Err(Error::invalid(
                "",
                format!(
                    "range {base:#x}..={last:#x} meets {:#x}..={:#x}",
                    next.base, next.last
                ),
            ));
        }
        ranges.insert(place, Range { base, last, device });
        Ok(())
    }

    /// Gives `device` all addresses that are nobody else's, with 0 as the base. The bus holds it for good.
    pub fn set_fallback(&self, device: Arc<dyn BusDevice>) {
        *self.fallback.write().unwrap_or_else(|e| e.into_inner()) = Some(device);
    }

    /// Takes away the range that begins at `base`; false if there is none.
    ///
    /// An access that has begun may still end in the device after this returns.
    pub fn remove(&self, base: u64) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        match ranges.binary_search_by_key(&base, |range| range.base) {
            Ok(place) => {
                ranges.remove(place);
                true
            }
            Err(_) => false,
        }
    }

    /// The guest reads at `address`: `data` is filled, with ones where there is no device.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((base, device)) = self.find(address, data.len()) {
            device.read(base, address.wrapping_sub(base), data);
        }
    }

    /// The guest writes at `address`; false if no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((base, device)) => {
                device.write(base, address.wrapping_sub(base), data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let end = address.checked_add((len as u64).checked_sub(1)?)?;
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        let place = ranges.partition_point(|range| range.last < address);
        match ranges.get(place) {
            Some(range) if range.base <= end => (range.base <= address && end <= range.last)
                .then(|| (range.base, Arc::clone(&range.device))),
            _ => {
                let fallback = self.fallback.read().unwrap_or_else(|e| e.into_inner());
                fallback.as_ref().map(|device| (0, Arc::clone(device)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
            data.fill((base + offset) as u8);
        }
        fn write(&self, base: u64, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((base, offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_of_its_range() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x20, 0x10, device.clone()).unwrap();
        bus.insert(0x40, 1, device.clone()).unwrap();
        let mut data = [0u8; 2];
        bus.read(0x2e, &mut data);
        assert_eq!(data, [0x2e, 0x2e]);
        assert!(bus.write(0x40, &[7]));
        assert_eq!(*device.0.lock().unwrap(), [(0x40, 0, vec![7])]);
    }

    #[test]
    fn outside_of_ranges_reads_ones_and_writes_nothing() {
        let bus = Bus::new();
        bus.insert(0x20, 0x10, Arc::new(Recorder::default()))
            .unwrap();
        for address in [0, 0x1f, 0x2f, 0x30, u64::MAX] {
            let mut data = [0u8; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff, 0xff], "{address:#x}");
            assert!(!bus.write(address, &[1, 2]), "{address:#x}");
        }
    }

    #[test]
    fn the_fallback_has_what_meets_no_range() {
        let bus = Bus::new();
        let (device, fallback) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        bus.insert(0x20, 0x10, device.clone()).unwrap();
        bus.set_fallback(fallback.clone());
        assert!(bus.write(0x1000, &[1, 2]));
        assert!(bus.write(0x20, &[3]));
        // Half in a range is nobody's.
        assert!(!bus.write(0x1f, &[4, 5]));
        assert!(!bus.write(0x2f, &[6, 7]));
        assert_eq!(*fallback.0.lock().unwrap(), [(0, 0x1000, vec![1, 2])]);
        assert_eq!(*device.0.lock().unwrap(), [(0x20, 0, vec![3])]);
    }

    #[test]
    fn ranges_that_meet_are_refused() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x20, 0x10, device.clone()).unwrap();
        for (base, size) in [
            (0x20, 1),
            (0x1f, 2),
            (0x2f, 1),
            (0x10, 0x40),
            (0x50, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(base, size, device.clone()).is_err(),
                "{base:#x}+{size:#x}"
            );
        }
        bus.insert(u64::MAX, 1, device.clone()).unwrap();
        bus.insert(0x30, 1, device).unwrap();
    }

    #[test]
    fn a_device_may_move_itself_from_within_a_write() {
        struct Mover(Arc<Bus>);
        impl BusDevice for Mover {
            fn read(&self, _: u64, _: u64, _: &mut [u8]) {}
            fn write(&self, base: u64, _: u64, data: &[u8]) {
                self.0.remove(base);
                self.0
                    .insert(u64::from(data[0]), 1, Arc::new(Mover(self.0.clone())))
                    .unwrap();
            }
        }
        let bus = Arc::new(Bus::new());
        bus.insert(1, 1, Arc::new(Mover(bus.clone()))).unwrap();
        assert!(bus.write(1, &[9]));
        assert!(!bus.write(1, &[1]));
        assert!(bus.write(9, &[1]));
    }
}
