// SPDX-License-Identifier: Apache-2.0
//! The answers to CPUID, as a table that can be asked, changed and given to KVM.
//!
//! The `host` model is what KVM supports, less what a guest here has no use for or would be harmed by: nested
//! virtualization, MWAIT, performance counters, SGX, processor trace, asynchronous page faults. What depends on the
//! number of vCPUs and on the vCPU is the same for all models: [`Answers::set_topology`].

use kvm_bindings::{
    kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};

use crate::cpu::flags::{self, Flag, Register};
use crate::error::{Error, Result};

/// Who made the processor, as leaf 0 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
}

impl Vendor {
    /// The twelve letters of leaf 0, in the order EBX, EDX, ECX.
    pub const fn letters(self) -> &'static [u8; 12] {
        match self {
            Vendor::Intel => b"GenuineIntel",
            Vendor::Amd => b"AuthenticAMD",
        }
    }
}

/// A table of answers.
#[derive(Clone, Debug, Default)]
pub struct Answers(Vec<kvm_cpuid_entry2>);

impl Answers {
    /// All that this host's KVM can give.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell.
    pub fn supported(kvm: &Kvm) -> Result<Answers> {
        let all = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| Error::kernel("KVM_GET_SUPPORTED_CPUID", e))?;
        let mut answers = Answers(all.as_slice().to_vec());
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            answers.set(flags::TSC_DEADLINE, true);
        }
        answers.set(flags::HYPERVISOR, true);
        Ok(answers)
    }

    /// The answer to a question, all zeroes if there is none.
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.find(leaf, subleaf)
            .and_then(|place| self.0.get(place))
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// Sets the whole answer to a question. `subleaf` is None where a leaf has none.
    pub fn put(&mut self, leaf: u32, subleaf: Option<u32>, answer: [u32; 4]) {
        let [eax, ebx, ecx, edx] = answer;
        let entry = kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf.unwrap_or(0),
            flags: subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let place = self.find(leaf, subleaf.unwrap_or(0));
        match place.and_then(|place| self.0.get_mut(place)) {
            Some(old) => *old = entry,
            None => self.0.push(entry),
        }
    }

    /// All of it: leaf, subleaf where the leaf has some, EAX to EDX.
    pub fn entries(&self) -> impl Iterator<Item = (u32, Option<u32>, [u32; 4])> + '_ {
        self.0.iter().map(|entry| {
            let has_subleaves = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            let subleaf = has_subleaves.then_some(entry.index);
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            (entry.function, subleaf, registers)
        })
    }

    /// Forgets a leaf with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.0.retain(|entry| entry.function != leaf);
    }

    /// Whether a flag is on.
    pub fn has(&self, flag: Flag) -> bool {
        let [eax, ebx, ecx, edx] = self.get(flag.leaf, flag.subleaf);
        let register = match flag.register {
            Register::Eax => eax,
            Register::Ebx => ebx,
            Register::Ecx => ecx,
            Register::Edx => edx,
        };
        register & 1u32.wrapping_shl(u32::from(flag.bit)) != 0
    }

    /// Turns a flag on or off; where its leaf is missing it stays off.
    pub fn set(&mut self, flag: Flag, on: bool) {
        let place = self.find(flag.leaf, flag.subleaf);
        let Some(entry) = place.and_then(|place| self.0.get_mut(place)) else {
            return;
        };
        let register = match flag.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        let bit = 1u32.wrapping_shl(u32::from(flag.bit));
        *register = if on {
            *register | bit
        } else {
            *register & !bit
        };
    }

    /// The vendor, None for one that is neither.
    pub fn vendor(&self) -> Option<Vendor> {
        let [_, ebx, ecx, edx] = self.get(0, 0);
        let letters: Vec<u8> = [ebx, edx, ecx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        [Vendor::Intel, Vendor::Amd]
            .into_iter()
            .find(|vendor| letters == vendor.letters())
    }

    /// Physical address bits.
    pub fn physical_bits(&self) -> u32 {
        self.get(0x8000_0008, 0)[0] & 0xff
    }

    /// For KVM_SET_CPUID2.
    ///
    /// # Errors
    /// `Internal` for more answers than KVM takes.
    pub fn to_kvm(&self) -> Result<CpuId> {
        CpuId::from_entries(&self.0).map_err(|_| Error::internal("too many CPUID answers"))
    }

    /// All answers, in the order of the questions: leaf, subleaf, EAX to EDX.
    pub fn list(&self) -> Vec<(u32, u32, [u32; 4])> {
        let mut list: Vec<_> = self
            .0
            .iter()
            .map(|e| (e.function, e.index, [e.eax, e.ebx, e.ecx, e.edx]))
            .collect();
        list.sort_unstable();
        list
    }

    fn find(&self, leaf: u32, subleaf: u32) -> Option<usize> {
        self.0.iter().position(|entry| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!indexed || entry.index == subleaf)
        })
    }

    /// One package of `vcpus` cores without hyperthreads; this is core `index`, which is its APIC id, too.
    pub fn set_topology(&mut self, index: u32, vcpus: u32) {
        let wide = vcpus.next_power_of_two();
        let several = vcpus > 1;
        let [eax, ebx, ecx, edx] = self.get(1, 0);
        let ebx = ebx & 0xffff | wide.wrapping_shl(16) | index.wrapping_shl(24);
        self.put(1, None, [eax, ebx, ecx, edx]);
        self.set(flags::HT, several);
        match self.vendor() {
            Some(Vendor::Amd) => {
                self.set(flags::CMP_LEGACY, several);
                let [eax, ebx, ecx, edx] = self.get(0x8000_0008, 0);
                // NC: cores less one; ApicIdCoreIdSize: bits of an APIC id that tell cores.
                let cores = vcpus.saturating_sub(1) | wide.trailing_zeros().wrapping_shl(12);
                self.put(0x8000_0008, None, [eax, ebx, ecx & !0xf0ff | cores, edx]);
            }
            _ => self.share_caches(wide),
        }
        // Leaf 0xb: threads of a core, cores of the package.
        let shift = wide.trailing_zeros();
        self.remove(0xb);
        self.put(0xb, Some(0), [0, 1, 0x100, index]);
        self.put(0xb, Some(1), [shift, vcpus, 0x201, index]);
        self.put(0xb, Some(2), [0, 0, 2, index]);
    }

    /// Leaf 4: caches up to the second level are a core's own, the third is the package's.
    fn share_caches(&mut self, wide: u32) {
        for subleaf in 0..8 {
            let [eax, ebx, ecx, edx] = self.get(4, subleaf);
            if eax & 0x1f == 0 {
                return;
            }
            let level = (eax >> 5) & 7;
            let sharing = if level >= 3 {
                wide.saturating_sub(1)
            } else {
                0
            };
            let cores = wide.saturating_sub(1);
            let eax = eax & 0x3fff | sharing.wrapping_shl(14) | cores.wrapping_shl(26);
            self.put(4, Some(subleaf), [eax, ebx, ecx, edx]);
        }
    }

    /// The `host` model, from all that is supported.
    pub fn host(mut self) -> Answers {
        for flag in [
            flags::VMX,
            flags::SVM,
            flags::MONITOR,
            flags::OSXSAVE,
            flags::TOPOEXT,
            flags::SGX,
            flags::INTEL_PT,
        ]
        .into_iter()
        .chain(flags::ASYNC_PAGE_FAULTS)
        {
            self.set(flag, false);
        }
        // KVM leaves the name out.
        for leaf in 0x8000_0002..=0x8000_0004 {
            #[allow(unused_unsafe)] // newer Rust calls it safe
            // SAFETY: every processor with virtualization has these leaves.
            let name = unsafe { std::arch::x86_64::__cpuid(leaf) };
            self.put(leaf, None, [name.eax, name.ebx, name.ecx, name.edx]);
        }
        // Power: the local APIC's timer never stops (ARAT), and nothing else.
        let arat = self.get(6, 0)[0] & 1 << 2;
        self.put(6, None, [arat, 0, 0, 0]);
        // MONITOR, performance counters, SGX, processor trace, the newer topology, AMD's caches, topology and encryption.
        for leaf in [
            5,
            0xa,
            0x12,
            0x14,
            0x1f,
            0x8000_001d,
            0x8000_001e,
            0x8000_001f,
        ] {
            self.remove(leaf);
        }
        self
    }
}
