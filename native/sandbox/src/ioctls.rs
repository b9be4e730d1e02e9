// SPDX-License-Identifier: Apache-2.0
//! The ioctl requests that a worker may make, by number, in groups.
//!
//! Left out on purpose: everything that changes a tap beyond its offloads (TUNSETPERSIST, TUNSETOWNER,
//! TUNSETIFF, SIOCSIFHWADDR: whoever holds a tap's descriptor could make it outlive the machine), TIOCSTI,
//! FICLONE, KVM_CREATE_GUEST_MEMFD, KVM_MEMORY_ENCRYPT_OP, and in the plain profile KVM_CREATE_DEVICE.
//! The kernel compares the low 32 bits of a request, and so do the filters.
//! Source: linux/kvm.h, fs.h, if_tun.h, vfio.h of Linux 6.1 on x86-64.

/// KVM_RUN: first in every filter that has it, for it is the hottest call of all.
pub const KVM_RUN: u32 = 0xae80;

/// Requests on /dev/kvm itself.
pub const KVM_SYSTEM: &[u32] = &[
    0x0000_ae00, // KVM_GET_API_VERSION
    0x0000_ae01, // KVM_CREATE_VM
    0x0000_ae03, // KVM_CHECK_EXTENSION
    0x0000_ae04, // KVM_GET_VCPU_MMAP_SIZE
    0xc004_ae02, // KVM_GET_MSR_INDEX_LIST
    0xc004_ae0a, // KVM_GET_MSR_FEATURE_INDEX_LIST
    0xc008_ae05, // KVM_GET_SUPPORTED_CPUID
    0xc008_ae09, // KVM_GET_EMULATED_CPUID
    0x8008_ae9d, // KVM_X86_GET_MCE_CAP_SUPPORTED
];

/// Making a VM's parts.
pub const KVM_CREATE: &[u32] = &[
    0x0000_ae41, // KVM_CREATE_VCPU
    0x0000_ae47, // KVM_SET_TSS_ADDR
    0x4008_ae48, // KVM_SET_IDENTITY_MAP_ADDR
    0x0000_ae60, // KVM_CREATE_IRQCHIP
    0x4040_ae77, // KVM_CREATE_PIT2
    0x0000_ae78, // KVM_SET_BOOT_CPU_ID
    0x4068_aea3, // KVM_ENABLE_CAP
    0x4188_aec6, // KVM_X86_SET_MSR_FILTER
    0x0000_aece, // KVM_GET_STATS_FD
];

/// Saving, restoring and resetting what belongs to the whole machine.
pub const KVM_STATE: &[u32] = &[
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8208_ae63, // KVM_SET_IRQCHIP
    0x8070_ae9f, // KVM_GET_PIT2
    0x4070_aea0, // KVM_SET_PIT2
    0x0000_ae71, // KVM_REINJECT_CONTROL
    0x4030_ae7b, // KVM_SET_CLOCK
    0x8030_ae7c, // KVM_GET_CLOCK
];

/// What the guest has written to.
pub const KVM_LOG: &[u32] = &[
    0x4010_ae42, // KVM_GET_DIRTY_LOG
];

/// What a register of a PCI device moves: memory slots, interrupt routes, doorbells.
pub const KVM_WIRING: &[u32] = &[
    0x4008_ae61, // KVM_IRQ_LINE
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4020_aea5, // KVM_SIGNAL_MSI
];

/// A vCPU's registers.
pub const KVM_VCPU: &[u32] = &[
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0x8140_aecc, // KVM_GET_SREGS2
    0x4140_aecd, // KVM_SET_SREGS2
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x4008_ae90, // KVM_SET_CPUID2
    0xc008_ae91, // KVM_GET_CPUID2
    0x81a0_ae8c, // KVM_GET_FPU
    0x41a0_ae8d, // KVM_SET_FPU
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
    0x9000_aea4, // KVM_GET_XSAVE
    0x9000_aecf, // KVM_GET_XSAVE2
    0x5000_aea5, // KVM_SET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0x4188_aea7, // KVM_SET_XCRS
    0x0000_aea3, // KVM_GET_TSC_KHZ
    0x0000_aea2, // KVM_SET_TSC_KHZ
    0x0000_aead, // KVM_KVMCLOCK_CTRL
    0x4004_ae8b, // KVM_SET_SIGNAL_MASK
    0x0000_ae9a, // KVM_NMI
    0x4008_ae9c, // KVM_X86_SETUP_MCE
];

/// What a block device under an image is asked.
pub const BLOCK: &[u32] = &[
    0x8008_1272, // BLKGETSIZE64
    0x0000_1268, // BLKSSZGET
    0x0000_127b, // BLKPBSZGET
    0x0000_1277, // BLKDISCARD
    0x0000_127f, // BLKZEROOUT
];

/// The offloads of a tap, and nothing else of it.
pub const TAP: &[u32] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
];

/// The queues of a tap that the kernel serves, vhost-net, and which frames it takes for them. Not here: everything else
/// of vhost (logs, the IOTLB, workers, busy loops), and the tap's programs that choose a queue (TUNSETSTEERINGEBPF).
pub const VHOST: &[u32] = &[
    0x4010_54d5, // TUNATTACHFILTER
    0x4010_54d6, // TUNDETACHFILTER
    0x4008_af00, // VHOST_SET_FEATURES
    0x0000_af01, // VHOST_SET_OWNER
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x4008_af30, // VHOST_NET_SET_BACKEND
];

/// Flags of the worker's own descriptors.
pub const DESCRIPTOR: &[u32] = &[
    0x0000_5421, // FIONBIO
    0x0000_5451, // FIOCLEX
];

/// Passthrough, in the vfio profile only.
pub const VFIO: &[u32] = &[
    0xc00c_aee0, // KVM_CREATE_DEVICE
    0x4018_aee1, // KVM_SET_DEVICE_ATTR
    0x0000_3b64, // VFIO_GET_API_VERSION
    0x0000_3b65, // VFIO_CHECK_EXTENSION
    0x0000_3b66, // VFIO_SET_IOMMU
    0x0000_3b67, // VFIO_GROUP_GET_STATUS
    0x0000_3b68, // VFIO_GROUP_SET_CONTAINER
    0x0000_3b69, // VFIO_GROUP_UNSET_CONTAINER
    0x0000_3b6a, // VFIO_GROUP_GET_DEVICE_FD
    0x0000_3b6b, // VFIO_DEVICE_GET_INFO
    0x0000_3b6c, // VFIO_DEVICE_GET_REGION_INFO
    0x0000_3b6d, // VFIO_DEVICE_GET_IRQ_INFO
    0x0000_3b6e, // VFIO_DEVICE_SET_IRQS
    0x0000_3b6f, // VFIO_DEVICE_RESET
    0x0000_3b70, // VFIO_IOMMU_GET_INFO
    0x0000_3b71, // VFIO_IOMMU_MAP_DMA
    0x0000_3b72, // VFIO_IOMMU_UNMAP_DMA
];
