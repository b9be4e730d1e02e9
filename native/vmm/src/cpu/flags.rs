// SPDX-License-Identifier: Apache-2.0
//! CPUID feature flags by name: the names are Linux's (/proc/cpuinfo).
//!
//! Source: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

/// A register of a leaf's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// One feature flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flag {
    /// As /proc/cpuinfo has it.
    pub name: &'static str,
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, where it matters, else 0.
    pub subleaf: u32,
    /// Where the answer lies.
    pub register: Register,
    /// 0 to 31.
    pub bit: u8,
}

/// Leaf 1, EDX.
const fn basic(name: &'static str, bit: u8) -> Flag {
    Flag {
        name,
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        bit,
    }
}

/// Leaf 1, ECX.
const fn more(name: &'static str, bit: u8) -> Flag {
    Flag {
        name,
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        bit,
    }
}

/// Leaf 7, EBX.
const fn structured(name: &'static str, bit: u8) -> Flag {
    Flag {
        name,
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        bit,
    }
}

/// Leaf 0x8000_0001.
const fn extended(name: &'static str, register: Register, bit: u8) -> Flag {
    Flag {
        name,
        leaf: 0x8000_0001,
        subleaf: 0,
        register,
        bit,
    }
}

/// Leaf 0x4000_0001, EAX: KVM's own (Documentation/virt/kvm/x86/cpuid.rst).
const fn kvm(name: &'static str, bit: u8) -> Flag {
    Flag {
        name,
        leaf: 0x4000_0001,
        subleaf: 0,
        register: Register::Eax,
        bit,
    }
}

/// More than one thread or core; follows the topology.
pub const HT: Flag = basic("ht", 28);
/// The same as AMD has it.
pub const CMP_LEGACY: Flag = extended("cmp_legacy", Register::Ecx, 1);
/// There is a hypervisor.
pub const HYPERVISOR: Flag = more("hypervisor", 31);
/// KVM's local APIC can do it where KVM_CAP_TSC_DEADLINE_TIMER says so; KVM_GET_SUPPORTED_CPUID does not.
pub const TSC_DEADLINE: Flag = more("tsc_deadline_timer", 24);
/// Nested virtualization on Intel.
pub const VMX: Flag = more("vmx", 5);
/// Nested virtualization on AMD.
pub const SVM: Flag = extended("svm", Register::Ecx, 2);
/// Sleeping until a write: costs a host processor.
pub const MONITOR: Flag = more("monitor", 3);
/// XSAVE is enabled by the guest; KVM keeps it as the guest's CR4 says.
pub const OSXSAVE: Flag = more("osxsave", 27);
/// AMD's own topology leaves.
pub const TOPOEXT: Flag = extended("topoext", Register::Ecx, 22);
/// Software guard extensions.
pub const SGX: Flag = structured("sgx", 2);
/// The time stamp counter runs at one speed and never stops; Linux calls it `constant_tsc` and `nonstop_tsc`.
pub const INVARIANT_TSC: Flag = Flag {
    name: "invariant_tsc",
    leaf: 0x8000_0007,
    subleaf: 0,
    register: Register::Edx,
    bit: 8,
};
/// Processor trace.
pub const INTEL_PT: Flag = structured("intel_pt", 25);

/// What makes a page fault of the host's visible to the guest: a machine that moves cannot have it.
pub const ASYNC_PAGE_FAULTS: [Flag; 3] = [
    kvm("kvm_asyncpf", 4),
    kvm("kvm_asyncpf_vmexit", 10),
    kvm("kvm_asyncpf_int", 14),
];

/// KVM's features in Linux 6.1, without asynchronous page faults.
pub const KVM_6_1: [Flag; 11] = [
    kvm("kvmclock", 0),
    kvm("kvm_nopiodelay", 1),
    kvm("kvmclock2", 3),
    kvm("kvm_steal_time", 5),
    kvm("kvm_pv_eoi", 6),
    kvm("kvm_pv_unhalt", 7),
    kvm("kvm_pv_tlb_flush", 9),
    kvm("kvm_pv_ipi", 11),
    kvm("kvm_poll_control", 12),
    kvm("kvm_pv_sched_yield", 13),
    kvm("kvmclock_stable", 24),
];

/// x86-64-v1 (System V ABI, AMD64 supplement, 3.1.1), and what every 64-bit system expects beside it. No VME:
/// emulated processors lack it, and nobody runs virtual 8086 mode.
pub const LEVEL_1: [Flag; 26] = [
    basic("fpu", 0),
    basic("de", 2),
    basic("pse", 3),
    basic("tsc", 4),
    basic("msr", 5),
    basic("pae", 6),
    basic("mce", 7),
    basic("cx8", 8),
    basic("apic", 9),
    basic("sep", 11),
    basic("mtrr", 12),
    basic("pge", 13),
    basic("mca", 14),
    basic("cmov", 15),
    basic("pat", 16),
    basic("pse36", 17),
    basic("clflush", 19),
    basic("mmx", 23),
    basic("fxsr", 24),
    basic("sse", 25),
    basic("sse2", 26),
    more("x2apic", 21),
    TSC_DEADLINE,
    extended("syscall", Register::Edx, 11),
    extended("nx", Register::Edx, 20),
    extended("lm", Register::Edx, 29),
];

/// What x86-64-v2 adds.
pub const LEVEL_2: [Flag; 7] = [
    more("pni", 0),
    more("ssse3", 9),
    more("cx16", 13),
    more("sse4_1", 19),
    more("sse4_2", 20),
    more("popcnt", 23),
    extended("lahf_lm", Register::Ecx, 0),
];

/// What x86-64-v3 adds.
pub const LEVEL_3: [Flag; 9] = [
    more("fma", 12),
    more("movbe", 22),
    more("xsave", 26),
    more("avx", 28),
    more("f16c", 29),
    structured("bmi1", 3),
    structured("avx2", 5),
    structured("bmi2", 8),
    extended("abm", Register::Ecx, 5),
];

/// What x86-64-v4 adds.
pub const LEVEL_4: [Flag; 5] = [
    structured("avx512f", 16),
    structured("avx512dq", 17),
    structured("avx512cd", 28),
    structured("avx512bw", 30),
    structured("avx512vl", 31),
];
