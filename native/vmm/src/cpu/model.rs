// SPDX-License-Identifier: Apache-2.0
//! Named CPU models: what a guest sees is the model's and nothing of the host's.
//!
//! A model is a vendor, a level of the x86-64 ABI and a version: `x86-64-v2-intel-1`. It fixes every answer to
//! CPUID: features, family and model number, caches, the number of physical address bits (40), the layout of the
//! XSAVE area and KVM's own leaves (Linux 6.1, without asynchronous page faults). A version is never changed; the golden
//! files of the tests hold that. What its MSRs hold is [`super::msr`]'s.
//!
//! A model marked `tsc` (`x86-64-v3-amd-tsc-1`) shows an invariant time stamp counter, by which a guest may tell
//! the time; a machine with it is saved with the counter's frequency and goes on only where that can be had
//! ([`super::state`]). No other model promises anything about it.
//!
//! A host that lacks one of a model's features cannot run it; the error names the feature. The same holds for the layout
//! of the XSAVE area, which is the processor's: AMD has AVX-512's registers elsewhere than Intel.

use kvm_ioctls::Kvm;

use crate::cpu::cpuid::{Answers, Vendor};
use crate::cpu::flags::{self, Flag, KVM_6_1, LEVEL_1, LEVEL_2, LEVEL_3, LEVEL_4};
use crate::error::{Error, Kind, Result};

/// The model that is whatever the host can do.
pub const HOST: &str = "host";

/// Physical address bits of every named model; the 64-bit MMIO window lies within.
const PHYSICAL_BITS: u32 = 40;
const LINEAR_BITS: u32 = 48;
/// The highest leaves of each range.
const LAST_BASIC: u32 = 0xd;
const LAST_KVM: u32 = 0x4000_0001;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// A part of the XSAVE area: the number of its bit in XCR0, its bytes and where it begins.
struct Component {
    number: u32,
    size: u32,
    offset: u32,
}

const fn component(number: u32, size: u32, offset: u32) -> Component {
    Component {
        number,
        size,
        offset,
    }
}

/// x87 and SSE, whose registers lie in the legacy area.
const XCR0_LEGACY: u32 = 0b11;
/// The legacy area and the XSAVE header.
const XSAVE_BASE: u32 = 576;
/// The upper halves of the YMM registers.
const AVX: [Component; 1] = [component(2, 256, XSAVE_BASE)];
/// The same, then opmasks, upper halves of ZMM0 to 15, ZMM16 to 31: behind MPX, which is in no model here.
const AVX512_INTEL: [Component; 4] = [
    component(2, 256, XSAVE_BASE),
    component(5, 64, 1088),
    component(6, 512, 1152),
    component(7, 1024, 1664),
];
/// The same as AMD has them, which never had MPX.
const AVX512_AMD: [Component; 4] = [
    component(2, 256, XSAVE_BASE),
    component(5, 64, 832),
    component(6, 512, 896),
    component(7, 1024, 1408),
];

/// One model.
struct Model {
    name: &'static str,
    vendor: Vendor,
    level: u8,
    family: u32,
    model: u32,
    stepping: u32,
    invariant_tsc: bool,
}

/// Family and model numbers are those of a processor of the level's time.
const MODELS: [Model; 14] = [
    model("x86-64-v1-intel-1", Vendor::Intel, 1, (6, 15, 11)),
    model("x86-64-v2-intel-1", Vendor::Intel, 2, (6, 26, 3)),
    model("x86-64-v3-intel-1", Vendor::Intel, 3, (6, 60, 4)),
    model("x86-64-v4-intel-1", Vendor::Intel, 4, (6, 85, 4)),
    marked("x86-64-v2-intel-tsc-1", Vendor::Intel, 2, (6, 26, 3)),
    marked("x86-64-v3-intel-tsc-1", Vendor::Intel, 3, (6, 60, 4)),
    marked("x86-64-v4-intel-tsc-1", Vendor::Intel, 4, (6, 85, 4)),
    model("x86-64-v1-amd-1", Vendor::Amd, 1, (15, 65, 2)),
    model("x86-64-v2-amd-1", Vendor::Amd, 2, (21, 1, 2)),
    model("x86-64-v3-amd-1", Vendor::Amd, 3, (21, 96, 1)),
    model("x86-64-v4-amd-1", Vendor::Amd, 4, (25, 17, 1)),
    marked("x86-64-v2-amd-tsc-1", Vendor::Amd, 2, (21, 1, 2)),
    marked("x86-64-v3-amd-tsc-1", Vendor::Amd, 3, (21, 96, 1)),
    marked("x86-64-v4-amd-tsc-1", Vendor::Amd, 4, (25, 17, 1)),
];

const fn model(
    name: &'static str,
    vendor: Vendor,
    level: u8,
    (family, model, stepping): (u32, u32, u32),
) -> Model {
    Model {
        name,
        vendor,
        level,
        family,
        model,
        stepping,
        invariant_tsc: false,
    }
}

/// One that shows an invariant time stamp counter.
const fn marked(
    name: &'static str,
    vendor: Vendor,
    level: u8,
    signature: (u32, u32, u32),
) -> Model {
    let mut marked = model(name, vendor, level, signature);
    marked.invariant_tsc = true;
    marked
}

/// The names of all models, `host` first.
pub fn names() -> Vec<&'static str> {
    std::iter::once(HOST)
        .chain(MODELS.iter().map(|model| model.name))
        .collect()
}

/// What a guest with this model sees, but for the topology.
///
/// # Errors
/// `InvalidArgument` for a name that is none, `NotSupported` for a model that this host cannot run.
pub fn answers(kvm: &Kvm, name: &str) -> Result<Answers> {
    let supported = Answers::supported(kvm)?;
    if name == HOST {
        return Ok(supported.host());
    }
    let model = find(name)?;
    model.check(&supported)?;
    Ok(model.answers())
}

/// What a guest with this named model sees on every host, but for the topology.
///
/// # Errors
/// `InvalidArgument` for a name that is none, and for `host`, which differs from host to host.
pub fn frozen(name: &str) -> Result<Answers> {
    Ok(find(name)?.answers())
}

fn find(name: &str) -> Result<&'static Model> {
    MODELS
        .iter()
        .find(|model| model.name == name)
        .ok_or_else(|| {
            Error::invalid(
                "cpu_model",
                format!("{name:?} is not known; known are {}", names().join(", ")),
            )
        })
}

impl Model {
    fn flags(&self) -> impl Iterator<Item = Flag> + '_ {
        let levels = [&LEVEL_1[..], &LEVEL_2, &LEVEL_3, &LEVEL_4];
        levels
            .into_iter()
            .take(usize::from(self.level))
            .flatten()
            .copied()
            .chain(KVM_6_1)
            .chain(self.invariant_tsc.then_some(flags::INVARIANT_TSC))
    }

    /// The parts of the XSAVE area, None for a model without.
    fn xsave(&self) -> Option<&'static [Component]> {
        match (self.level, self.vendor) {
            (..=2, _) => None,
            (3, _) => Some(&AVX),
            (_, Vendor::Intel) => Some(&AVX512_INTEL),
            (_, Vendor::Amd) => Some(&AVX512_AMD),
        }
    }

    fn check(&self, supported: &Answers) -> Result<()> {
        let refuse = |what: String| {
            Err(Error::new(
                Kind::NotSupported,
                "cpu_model",
                format!("{} cannot run here: {what}; `host` can", self.name),
            ))
        };
        if supported.vendor() != Some(self.vendor) {
            let vendor = String::from_utf8_lossy(self.vendor.letters());
            return refuse(format!("the host's processor is not {vendor}"));
        }
        let missing: Vec<&str> = self
            .flags()
            .filter(|flag| !supported.has(*flag))
            .map(|flag| flag.name)
            .collect();
        if !missing.is_empty() {
            return refuse(format!("the host lacks {}", missing.join(", ")));
        }
        let bits = supported.physical_bits();
        if bits < PHYSICAL_BITS {
            return refuse(format!(
                "the host has {bits} physical address bits, the model {PHYSICAL_BITS}"
            ));
        }
        for part in self.xsave().unwrap_or_default() {
            let [size, offset, ..] = supported.get(0xd, part.number);
            if (size, offset) != (part.size, part.offset) {
                return refuse(format!(
                    "part {} of the host's XSAVE area has {size} bytes at {offset}, the model's {} at {}",
                    part.number, part.size, part.offset
                ));
            }
        }
        Ok(())
    }

    fn answers(&self) -> Answers {
        let mut answers = Answers::default();
        let letters = self.vendor.letters();
        let word = |at: usize| {
            letters
                .get(at..)
                .and_then(|rest| rest.first_chunk::<4>())
                .map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let vendor = |last: u32| [last, word(0), word(8), word(4)];
        answers.put(0, None, vendor(LAST_BASIC));
        // EBX: CLFLUSH works on 8 times 8 bytes.
        answers.put(1, None, [self.signature(), 8 << 8, 0, 0]);
        answers.put(6, None, [1 << 2, 0, 0, 0]);
        answers.put(7, Some(0), [0; 4]);
        answers.put(0x4000_0000, None, [LAST_KVM, KVM[0], KVM[1], KVM[2]]);
        answers.put(0x4000_0001, None, [0; 4]);
        let intel = self.vendor == Vendor::Intel;
        answers.put(
            0x8000_0000,
            None,
            if intel {
                [LAST_EXTENDED, 0, 0, 0]
            } else {
                vendor(LAST_EXTENDED)
            },
        );
        let signature = if intel { 0 } else { self.signature() };
        answers.put(0x8000_0001, None, [signature, 0, 0, 0]);
        self.put_name(&mut answers);
        self.put_caches(&mut answers);
        answers.put(0x8000_0007, None, [0; 4]);
        answers.put(
            0x8000_0008,
            None,
            [PHYSICAL_BITS | LINEAR_BITS << 8, 0, 0, 0],
        );
        for flag in self.flags().chain([flags::HYPERVISOR]) {
            answers.set(flag, true);
        }
        if self.vendor == Vendor::Amd {
            self.repeat_basic_flags(&mut answers);
        }
        self.put_xsave(&mut answers);
        answers
    }

    /// Family, model and stepping as leaf 1 packs them.
    fn signature(&self) -> u32 {
        let (base, extended) = if self.family >= 15 {
            (15, self.family.saturating_sub(15))
        } else {
            (self.family, 0)
        };
        self.stepping
            | (self.model & 0xf) << 4
            | base << 8
            | (self.model >> 4) << 16
            | extended << 20
    }

    fn put_name(&self, answers: &mut Answers) {
        let mut name = [0u8; 48];
        for (place, byte) in name.iter_mut().zip(self.name.bytes()) {
            *place = byte;
        }
        let words: Vec<u32> = name
            .chunks_exact(4)
            .filter_map(|bytes| bytes.first_chunk::<4>())
            .map(|bytes| u32::from_le_bytes(*bytes))
            .collect();
        for (leaf, words) in (0x8000_0002u32..).zip(words.chunks_exact(4)) {
            if let Some(words) = words.first_chunk::<4>() {
                answers.put(leaf, None, *words);
            }
        }
    }

    /// 32 KiB, 32 KiB, 512 KiB a core and 16 MiB together, lines of 64 bytes.
    fn put_caches(&self, answers: &mut Answers) {
        match self.vendor {
            Vendor::Intel => {
                // Leaf 2: all is in leaf 4.
                answers.put(2, None, [0x00ff_ff01, 0, 0, 0]);
                for (subleaf, (kind, level, ways, sets)) in (0..).zip([
                    (1, 1, 8, 64),
                    (2, 1, 8, 64),
                    (3, 2, 8, 1024),
                    (3, 3, 16, 16384u32),
                ]) {
                    let self_initializing = 1 << 8;
                    let eax = kind | level << 5 | self_initializing;
                    let ebx = 63 | (ways - 1) << 22;
                    answers.put(4, Some(subleaf), [eax, ebx, sets.saturating_sub(1), 0]);
                }
                answers.put(4, Some(4), [0; 4]);
                answers.put(0x8000_0006, None, [0, 0, 512 << 16 | 6 << 12 | 64, 0]);
            }
            Vendor::Amd => {
                // L1: KiB, ways, lines a tag, bytes a line. L2 and L3 have codes for 8 and 16 ways.
                let first = 32 << 24 | 8 << 16 | 1 << 8 | 64;
                answers.put(0x8000_0005, None, [0, 0, first, first]);
                let (second, third) = (
                    512 << 16 | 6 << 12 | 1 << 8 | 64,
                    32 << 18 | 8 << 12 | 1 << 8 | 64,
                );
                answers.put(0x8000_0006, None, [0, 0, second, third]);
            }
        }
    }

    /// AMD repeats leaf 1's EDX in 0x8000_0001 where the bits mean the same (APM volume 3, E.4.2).
    fn repeat_basic_flags(&self, answers: &mut Answers) {
        const SAME: u32 = 0x0183_f3ff;
        let basic = answers.get(1, 0)[3] & SAME;
        let [eax, ebx, ecx, edx] = answers.get(0x8000_0001, 0);
        answers.put(0x8000_0001, None, [eax, ebx, ecx, edx | basic]);
    }

    fn put_xsave(&self, answers: &mut Answers) {
        let Some(parts) = self.xsave() else {
            answers.put(0xd, Some(0), [0; 4]);
            return;
        };
        let mut xcr0 = XCR0_LEGACY;
        let mut size = XSAVE_BASE;
        for part in parts {
            xcr0 |= 1 << part.number;
            size = size.max(part.offset + part.size);
            answers.put(0xd, Some(part.number), [part.size, part.offset, 0, 0]);
        }
        answers.put(0xd, Some(0), [xcr0, size, size, 0]);
        answers.put(0xd, Some(1), [0; 4]);
    }
}

/// "KVMKVMKVM" in EBX, ECX, EDX.
const KVM: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::path::Path;

    use super::*;

    /// Every answer of every model, as its golden file has it.
    #[test]
    fn a_published_model_does_not_change() {
        for model in &MODELS {
            let mut answers = model.answers();
            answers.set_topology(1, 3);
            let mut text = String::new();
            for (leaf, subleaf, [eax, ebx, ecx, edx]) in answers.list() {
                writeln!(
                    text,
                    "{leaf:08x} {subleaf:x}: {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"
                )
                .unwrap();
            }
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/golden/cpu")
                .join(model.name);
            let golden = std::fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(text, golden, "{}", path.display());
        }
    }

    #[test]
    fn a_host_that_lacks_a_feature_is_told_its_name() {
        let model = find("x86-64-v2-amd-1").unwrap();
        let mut host = model.answers();
        model.check(&host).unwrap();
        for flag in model.flags() {
            host.set(flag, false);
            let message = model.check(&host).unwrap_err().message;
            assert!(
                message.contains(&format!("lacks {};", flag.name)),
                "{message}"
            );
            host.set(flag, true);
        }
        host.put(0x8000_0008, None, [39, 0, 0, 0]);
        assert!(model
            .check(&host)
            .unwrap_err()
            .message
            .contains("39 physical"));
        host.put(0x8000_0008, None, [40, 0, 0, 0]);
        model.check(&host).unwrap();
        let other = find("x86-64-v2-intel-1").unwrap();
        assert!(other
            .check(&host)
            .unwrap_err()
            .message
            .contains("GenuineIntel"));
    }

    #[test]
    fn a_host_whose_xsave_area_is_laid_out_otherwise_is_refused() {
        let (intel, amd) = (
            find("x86-64-v4-intel-1").unwrap(),
            find("x86-64-v4-amd-1").unwrap(),
        );
        let mut host = intel.answers();
        intel.check(&host).unwrap();
        for part in [2, 5, 6, 7] {
            let kept = host.get(0xd, part);
            host.put(0xd, Some(part), amd.answers().get(0xd, part));
            let refused = intel.check(&host);
            assert_eq!(refused.is_ok(), part == 2, "{part}");
            host.put(0xd, Some(part), kept);
        }
        assert_eq!(intel.answers().get(0xd, 0), [0xe7, 2688, 2688, 0]);
        assert_eq!(amd.answers().get(0xd, 0), [0xe7, 2432, 2432, 0]);
    }

    #[test]
    fn an_invariant_tsc_is_shown_by_marked_models_only() {
        for model in &MODELS {
            let marked = model.name.contains("-tsc-");
            assert_eq!(model.answers().has(flags::INVARIANT_TSC), marked);
            let plain = find(&model.name.replace("-tsc", "")).unwrap();
            assert_eq!(model.check(&plain.answers()).is_ok(), !marked);
        }
    }

    #[test]
    fn each_level_runs_where_a_higher_one_does() {
        for vendor in ["intel", "amd"] {
            let level = |n: u8| find(&format!("x86-64-v{n}-{vendor}-1")).unwrap();
            level(1).check(&level(3).answers()).unwrap();
            level(2).check(&level(3).answers()).unwrap();
            level(3).check(&level(4).answers()).unwrap();
            assert!(level(3).check(&level(2).answers()).is_err());
        }
    }

    #[test]
    fn the_signature_is_packed_as_leaf_1_has_it() {
        assert_eq!(find("x86-64-v3-intel-1").unwrap().signature(), 0x306c4);
        assert_eq!(find("x86-64-v2-amd-1").unwrap().signature(), 0x0060_0f12);
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let mut answers = find("x86-64-v1-intel-1").unwrap().answers();
        answers.set_topology(2, 4);
        assert_eq!(answers.get(1, 0)[1] >> 16, 0x0204);
        assert_eq!(answers.get(0xb, 1), [2, 4, 0x201, 2]);
        // The third cache is shared by all, the second by none.
        assert_eq!(answers.get(4, 3)[0] >> 14 & 0xfff, 3);
        assert_eq!(answers.get(4, 2)[0] >> 14 & 0xfff, 0);
    }
}
