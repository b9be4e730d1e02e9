// SPDX-License-Identifier: Apache-2.0
//! virtio-balloon (virtio 1.2, 5.5): memory that the guest gives back when it is asked to, and what it says about the
//! rest.
//!
//! | queue | the driver offers | done with it |
//! |---|---|---|
//! | 0 inflate | page numbers | those pages are the host's again |
//! | 1 deflate | page numbers | counted; the pages come back by themselves when they are touched |
//! | 2 statistics | its figures | kept until somebody asks for newer ones, then given back |
//! | 3 reporting | free pages | the same as inflate, but the guest may use them again without a word |
//!
//! MUST_TELL_HOST is not offered, so a driver need not ask before it uses a page again; DEFLATE_ON_OOM is, so a
//! guest in need takes memory back by itself. The target is a wish: what the guest makes of it, and every figure of
//! its own, is its word. What it names that is not RAM is counted and left alone, and a page it gives
//! twice is given once. The page number space is that of 4 KiB pages, whatever the guest's are.
//!
//! Left out: free page hints (they serve migration with a driver that Linux has and others have not), page
//! poisoning (a guest that poisons free pages then does not report them).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Segments};
use super::queue::Fault;
use super::{LiveConfig, Model, F_RING};
use crate::error::{Error, Kind, Result};
use crate::io::Count;
use crate::memory::GuestMemoryMmap;
use crate::memory::{self, PAGE};
use crate::state::{self, State, Stateful};

/// VIRTIO_BALLOON_F_STATS_VQ.
pub const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
pub const F_PAGE_REPORTING: u64 = 1 << 5;

/// The queues. The reporting queue follows the last one offered before it, as in QEMU and Linux.
pub const INFLATE: u16 = 0;
/// Pages that the guest uses again.
pub const DEFLATE: u16 = 1;
/// The guest's figures.
pub const STATISTICS: u16 = 2;
/// Pages that the guest does not use now.
pub const REPORTING: u16 = 3;

/// The longest list of page numbers in one request, in bytes; Linux sends 1 KiB.
const LIST_MAX: u64 = 64 << 10;
/// The longest statistics, in bytes: a hundred figures.
const STATISTICS_MAX: usize = 1000;
/// num_pages and actual.
const CONFIG_LEN: usize = 8;
/// How old figures are when they are asked for anew.
const FRESH: Duration = Duration::from_secs(1);

/// The guest's figures by their tag (5.5.6.4); the first six in bytes but for the two counts of faults.
const FIGURES: [&str; 10] = [
    "swapped_in",
    "swapped_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "caches",
    "huge_page_allocations",
    "huge_page_failures",
];

/// What a machine's balloon is to all who have to do with it.
#[derive(Debug)]
pub struct Balloon {
    /// Bytes of the guest's RAM.
    memory: u64,
    /// num_pages: how many pages the host would like to have.
    target: AtomicU32,
    /// How many the guest says it has given.
    actual: AtomicU32,
    generation: AtomicU8,
    /// Written when the target is another one, or newer figures are wanted.
    pub(crate) nudge: EventFd,
    wanted: AtomicBool,
    figures: Mutex<Figures>,
    inflated: AtomicU64,
    deflated: AtomicU64,
    reported: AtomicU64,
    refused: AtomicU64,
    faults: AtomicU64,
}

#[derive(Debug, Default)]
struct Figures {
    values: [Option<u64>; FIGURES.len()],
    at: Option<Instant>,
}

impl Balloon {
    /// An empty balloon in a guest of `memory` bytes.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no eventfd.
    pub fn new(memory: u64) -> Result<Arc<Balloon>> {
        Ok(Arc::new(Balloon {
            memory,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            generation: AtomicU8::new(0),
            nudge: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|e| Error::kernel("eventfd", e))?,
            wanted: AtomicBool::new(false),
            figures: Mutex::default(),
            inflated: AtomicU64::new(0),
            deflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        }))
    }

    /// What the guest sees.
    pub fn model(self: &Arc<Balloon>) -> Model {
        Model {
            device_type: 5,
            class: 0x00ff00,
            features: F_RING | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING,
            queues: 4,
            queue_size: 128,
            config: vec![0; CONFIG_LEN],
            live: Some(self.clone()),
        }
    }

    /// Asks the guest to get by with `bytes` of its memory.
    ///
    /// # Errors
    /// `InvalidArgument` for more than it has, or nothing, or parts of pages.
    pub fn set_target(&self, bytes: u64) -> Result<()> {
        let inflate = self.memory.checked_sub(bytes).map(|bytes| bytes / PAGE);
        let pages = inflate.and_then(|pages| u32::try_from(pages).ok());
        let Some(pages) = pages.filter(|_| bytes > 0 && bytes % PAGE == 0) else {
            return Err(Error::new(
                Kind::InvalidArgument,
                "target",
                format!(
                    "{bytes} bytes are not a multiple of {PAGE} up to the machine's {}",
                    self.memory
                ),
            ));
        };
        if self.target.swap(pages, Ordering::AcqRel) != pages {
            self.generation.fetch_add(1, Ordering::AcqRel);
            // A full counter wakes as well.
            let _ = self.nudge.write(1);
        }
        Ok(())
    }

    /// Whether newer figures are wanted; asked once.
    pub(crate) fn take_wanted(&self) -> bool {
        self.wanted.swap(false, Ordering::AcqRel)
    }

    /// The driver is gone: nothing is in the balloon, and nobody says how the guest is.
    pub(crate) fn forget(&self) {
        self.actual.store(0, Ordering::Release);
        *self.figures() = Figures::default();
    }

    /// The driver broke the rules.
    pub(crate) fn broken(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// The pages that `chain` names are the host's.
    ///
    /// # Errors
    /// A [`Fault`] for a list that is too long, or not in RAM.
    pub(crate) fn inflate(
        &self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<(), Fault> {
        let mut pages = page_numbers(&chain.readable, memory)?;
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(first) = run.first() else { continue };
            let len = PAGE * run.len() as u64;
            self.give(memory, PAGE * u64::from(*first), len, &self.inflated);
        }
        Ok(())
    }

    /// The guest uses the pages that `chain` names again.
    ///
    /// # Errors
    /// As [`Balloon::inflate`].
    pub(crate) fn deflate(&self, chain: &Chain) -> std::result::Result<(), Fault> {
        let bytes = list_len(&chain.readable)? / 4 * PAGE;
        self.deflated.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The guest does not use what `chain` would let the device write to.
    ///
    /// # Errors
    /// A [`Fault`] for something to read.
    pub(crate) fn report(
        &self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<(), Fault> {
        if !chain.readable.is_empty() {
            return Err(Fault::Request);
        }
        for segment in chain.writable.iter() {
            let len = u64::from(segment.len);
            self.give(memory, segment.address, len, &self.reported);
        }
        Ok(())
    }

    fn give(&self, memory: &GuestMemoryMmap, start: u64, len: u64, count: &AtomicU64) {
        // The kernel's refusal is no fault of the guest's: the memory then only stays where it is.
        let given = memory::discard(memory, start, len).unwrap_or(0);
        count.fetch_add(given, Ordering::Relaxed);
        let refused = len.saturating_sub(given);
        self.refused.fetch_add(refused, Ordering::Relaxed);
    }

    /// Reads the guest's figures: 16-bit tag and 64-bit value, one behind the other; unknown tags are skipped.
    ///
    /// # Errors
    /// `Fault::Memory` when they are not in RAM.
    pub(crate) fn read_figures(
        &self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<(), Fault> {
        let mut bytes = [0; STATISTICS_MAX];
        let len = chain.readable.read_at(memory, 0, &mut bytes)?;
        let mut figures = self.figures();
        for entry in bytes.get(..len).unwrap_or(&[]).chunks_exact(10) {
            let (tag, value) = entry.split_at(2);
            let tag = tag.try_into().map_or(u16::MAX, u16::from_le_bytes);
            let value = value.try_into().map_or(u64::MAX, u64::from_le_bytes);
            if let Some(place) = figures.values.get_mut(usize::from(tag)) {
                *place = (value != u64::MAX).then_some(value);
            }
        }
        figures.at = Some(Instant::now());
        Ok(())
    }

    fn figures(&self) -> MutexGuard<'_, Figures> {
        self.figures.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn registers(&self) -> [u8; CONFIG_LEN] {
        let target = u64::from(self.target.load(Ordering::Acquire));
        let actual = u64::from(self.actual.load(Ordering::Acquire));
        (target | actual << 32).to_le_bytes()
    }
}

/// How long a list of page numbers is.
fn list_len(list: &Segments) -> std::result::Result<u64, Fault> {
    Some(list.len())
        .filter(|len| *len <= LIST_MAX)
        .ok_or(Fault::Request)
}

fn page_numbers(list: &Segments, memory: &GuestMemoryMmap) -> std::result::Result<Vec<u32>, Fault> {
    let mut bytes = vec![0; list_len(list)? as usize];
    list.read_at(memory, 0, &mut bytes)?;
    let numbers = bytes.chunks_exact(4);
    Ok(numbers
        .filter_map(|number| number.try_into().ok().map(u32::from_le_bytes))
        .collect())
}

/// The guest's figures are not part of it: it is asked for newer ones.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    target: u32,
    actual: u32,
    generation: u8,
}

impl Stateful for Balloon {
    fn save(&self) -> Result<State> {
        state::write(&Saved {
            target: self.target.load(Ordering::Acquire),
            actual: self.actual.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
        })
    }

    fn restore(&self, state: &State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        if PAGE.saturating_mul(u64::from(saved.target)) >= self.memory {
            return Err(state::invalid(
                "a balloon as large as the guest's memory is asked for",
            ));
        }
        self.target.store(saved.target, Ordering::Release);
        self.actual.store(saved.actual, Ordering::Release);
        self.generation.store(saved.generation, Ordering::Release);
        Ok(())
    }
}

impl LiveConfig for Balloon {
    fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        let rest = registers.iter().skip(offset as usize);
        for (byte, value) in data.iter_mut().zip(rest) {
            *byte = *value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // `actual` is the driver's, as a whole.
        if let (4, Ok(value)) = (offset, data.try_into()) {
            self.actual
                .store(u32::from_le_bytes(value), Ordering::Release);
        }
    }
}

impl Count for Balloon {
    fn to_json(&self) -> Value {
        let figures = self.figures();
        let age = figures.at.map(|at| at.elapsed());
        if age.is_none_or(|age| age > FRESH) {
            self.wanted.store(true, Ordering::Release);
            let _ = self.nudge.write(1);
        }
        let ballooned = PAGE * u64::from(self.actual.load(Ordering::Acquire));
        let asked = PAGE * u64::from(self.target.load(Ordering::Acquire));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut all = json!({
            "target": self.memory.saturating_sub(asked),
            "ballooned": ballooned.min(self.memory),
            "inflated": count(&self.inflated),
            "deflated": count(&self.deflated),
            "reported": count(&self.reported),
            "refused": count(&self.refused),
            "faults": count(&self.faults),
        });
        if let Some(age) = age {
            let known = FIGURES.iter().zip(figures.values);
            let mut guest: serde_json::Map<_, _> = known
                .filter_map(|(name, value)| Some(((*name).to_owned(), json!(value?))))
                .collect();
            guest.insert("age_ms".to_owned(), json!(age.as_millis() as u64));
            if let Some(all) = all.as_object_mut() {
                all.insert("guest".to_owned(), Value::Object(guest));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::Segment;
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn chain(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Chain {
        let segments = |list: &[(u64, u32)]| {
            let list = list.iter();
            Segments(
                list.map(|&(address, len)| Segment { address, len })
                    .collect(),
            )
        };
        Chain {
            head: 0,
            readable: segments(readable),
            writable: segments(writable),
        }
    }

    fn numbers(memory: &GuestMemoryMmap, pages: &[u32]) -> Chain {
        for (place, page) in (0..).zip(pages) {
            memory
                .write_obj(*page, GuestAddress(0x8000 + 4 * place))
                .unwrap();
        }
        chain(&[(0x8000, 4 * pages.len() as u32)], &[])
    }

    #[test]
    fn a_target_is_what_is_to_be_left() {
        let balloon = Balloon::new(1 << 20).unwrap();
        assert_eq!(balloon.generation(), 0);
        balloon.set_target(1 << 19).unwrap();
        balloon.set_target(1 << 19).unwrap();
        assert_eq!(balloon.generation(), 1);
        let mut pages = [0; 4];
        balloon.read(0, &mut pages);
        assert_eq!(u32::from_le_bytes(pages), 128);
        for bad in [0, 4095, (1 << 20) + 4096, u64::MAX] {
            assert_eq!(balloon.set_target(bad).unwrap_err().argument, "target");
        }
        assert_eq!(balloon.to_json()["target"], 1 << 19);
    }

    #[test]
    fn what_the_driver_says_it_gave_is_bounded_by_what_there_is() {
        let balloon = Balloon::new(1 << 20).unwrap();
        balloon.write(0, &[1, 0, 0, 0]);
        balloon.write(4, &[0xff; 4]);
        balloon.write(4, &[1, 0]);
        let mut registers = [0; 12];
        balloon.read(0, &mut registers);
        assert_eq!(registers, [0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0]);
        assert_eq!(balloon.to_json()["ballooned"], 1 << 20);
        balloon.forget();
        assert_eq!(balloon.to_json()["ballooned"], 0);
    }

    #[test]
    fn pages_are_given_once_however_often_they_are_named_and_only_ram_is() {
        let (memory, balloon) = (memory(), Balloon::new(1 << 20).unwrap());
        for page in [16u64, 17, 20, 255] {
            memory.write_obj(7u8, GuestAddress(PAGE * page)).unwrap();
        }
        let list = numbers(&memory, &[17, 16, 17, 255, 256, u32::MAX]);
        balloon.inflate(&list, &memory).unwrap();
        let byte = |page| memory.read_obj::<u8>(GuestAddress(PAGE * page)).unwrap();
        assert_eq!([byte(16), byte(17), byte(20), byte(255)], [0, 0, 7, 0]);
        let figures = balloon.to_json();
        assert_eq!(figures["inflated"], 3 * PAGE);
        assert_eq!(figures["refused"], 2 * PAGE);
    }

    #[test]
    fn a_list_that_is_endless_or_not_in_ram_is_a_fault() {
        let (memory, balloon) = (memory(), Balloon::new(1 << 20).unwrap());
        for list in [
            &[(0x8000, u32::MAX)][..],
            &[(0x8000, 0x8001), (0, 0x8000)],
            &[(1 << 20, 4)],
        ] {
            assert!(balloon.inflate(&chain(list, &[]), &memory).is_err());
        }
        assert!(balloon.deflate(&chain(&[(0, u32::MAX)], &[])).is_err());
        assert!(balloon.inflate(&chain(&[], &[]), &memory).is_ok());
        assert_eq!(balloon.to_json()["inflated"], 0);
    }

    #[test]
    fn free_pages_are_given_in_whole_pages() {
        let (memory, balloon) = (memory(), Balloon::new(1 << 20).unwrap());
        let free = chain(
            &[],
            &[(0x1_0800, 0x2000), (0xf_f000, u32::MAX), (u64::MAX, 0x1000)],
        );
        balloon.report(&free, &memory).unwrap();
        assert_eq!(balloon.to_json()["reported"], 2 * PAGE);
        assert!(balloon.report(&chain(&[(0, 16)], &[]), &memory).is_err());
    }

    #[test]
    fn figures_are_the_guests_word_and_unknown_ones_are_skipped() {
        let (memory, balloon) = (memory(), Balloon::new(1 << 20).unwrap());
        assert_eq!(balloon.to_json().get("guest"), None);
        assert!(balloon.take_wanted() && !balloon.take_wanted());
        let mut at = 0x8000;
        for (tag, value) in [(4u16, 1234u64), (5, u64::MAX), (77, 9), (6, 99)] {
            memory.write_obj(tag, GuestAddress(at)).unwrap();
            memory.write_obj(value, GuestAddress(at + 2)).unwrap();
            at += 10;
        }
        // The last one is cut off.
        let list = chain(&[(0x8000, 39)], &[]);
        balloon.read_figures(&list, &memory).unwrap();
        let guest = balloon.to_json()["guest"].clone();
        assert_eq!(guest["free"], 1234);
        assert_eq!([guest.get("total"), guest.get("available")], [None, None]);
        assert!(!balloon.take_wanted());
        assert!(balloon
            .read_figures(&chain(&[(1 << 20, 10)], &[]), &memory)
            .is_err());
    }
}
