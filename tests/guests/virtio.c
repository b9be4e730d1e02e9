/* SPDX-License-Identifier: Apache-2.0 */
/* The transport: registers, one queue, notifications, MSI-X. */

#include "virtio.h"

enum { CAPABILITY_VENDOR = 9, CAPABILITY_MSIX = 0x11 };

volatile struct rings rings;
struct virtio virtio;

static u16 offered;

/* Where a memory BAR of 64 bits is; QEMU has the structures in another one than vmbus. */
static u64 bar(u32 function, u32 index)
{
    u32 at = 0x10 + 4 * index;
    return (pci_read(function, at, 4) & ~15u) | (u64)pci_read(function, at + 4, 4) << 32;
}

int virtio_find(u32 function)
{
    if (pci_read(function, 0, 2) != 0x1af4)
        return 0;
    virtio = (struct virtio){ .function = function };
    virtio.bar = bar(function, 0);
    for (u32 at = pci_capability(function, CAPABILITY_VENDOR, 0); at; ) {
        u64 structure = bar(function, pci_read(function, at + 4, 1)) + pci_read(function, at + 8, 4);
        switch (pci_read(function, at + 3, 1)) {
        case 1: virtio.common = structure; break;
        case 2: virtio.notify = structure; break;
        case 3: virtio.isr = structure; break;
        case 4:
            virtio.device = structure;
            virtio.device_len = pci_read(function, at + 12, 4);
            break;
        }
        u32 next = pci_read(function, at + 1, 1);
        while (next && pci_read(function, next, 1) != CAPABILITY_VENDOR)
            next = pci_read(function, next + 1, 1);
        at = next;
    }
    pci_write(function, 4, 2, 6);
    return virtio.common && virtio.notify;
}

void virtio_write(u32 common_register, u32 bytes, u64 value)
{
    u64 at = virtio.common + common_register;
    if (bytes == 1)
        *(volatile u8 *)at = value;
    else if (bytes == 2)
        *(volatile u16 *)at = value;
    else if (bytes == 4)
        *(volatile u32 *)at = value;
    else
        *(volatile u64 *)at = value;
}

u8 virtio_status(void)
{
    return *(volatile u8 *)(virtio.common + STATUS);
}

void virtio_reset(void)
{
    virtio_write(STATUS, 1, 0);
    while (virtio_status())
        pause();
}

int virtio_start(u64 without, u64 used)
{
    virtio_reset();
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER);
    virtio.features = 0;
    for (u32 half = 0; half < 2; half++) {
        virtio_write(OFFER_SELECT, 4, half);
        u32 accepted = mmio_read(virtio.common + OFFER) & ~(u32)(without >> (32 * half));
        virtio.features |= (u64)accepted << (32 * half);
        virtio_write(ACCEPT_SELECT, 4, half);
        virtio_write(ACCEPT, 4, accepted);
    }
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(virtio_status() & FEATURES_OK))
        return 0;
    volatile u8 *bytes = (volatile u8 *)&rings;
    for (u32 i = 0; i < sizeof rings; i++)
        bytes[i] = 0;
    offered = 0;
    virtio_write(QUEUE_SELECT, 2, 0);
    virtio_write(QUEUE_SIZE, 2, SIZE);
    virtio_write(QUEUE_DESCRIPTORS, 8, (u64)rings.descriptors);
    virtio_write(QUEUE_AVAILABLE, 8, (u64)&rings.available);
    virtio_write(QUEUE_USED, 8, used ? used : (u64)&rings.used);
    virtio_write(QUEUE_ENABLE, 2, 1);
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

void virtio_use_msix(u32 line)
{
    u32 at = pci_capability(virtio.function, CAPABILITY_MSIX, 0);
    u64 entry = virtio.bar + (pci_read(virtio.function, at + 4, 4) & ~7u) + 16;
    mmio_write(entry, 0xfee00000 | (mmio_read(0xfee00020) >> 24) << 12);
    mmio_write(entry + 4, 0);
    mmio_write(entry + 8, 32 + line);
    mmio_write(entry + 12, 0);
    pci_write(virtio.function, at + 2, 2, 0x8000);
    virtio_write(QUEUE_SELECT, 2, 0);
    virtio_write(QUEUE_VECTOR, 2, 1);
}

void describe(u16 index, const volatile void *address, u32 len, u16 flags, u16 next)
{
    rings.descriptors[index].address = (u64)address;
    rings.descriptors[index].len = len;
    rings.descriptors[index].flags = flags;
    rings.descriptors[index].next = next;
}

void offer(u16 head)
{
    rings.available.ring[offered % SIZE] = head;
    barrier();
    rings.available.index = ++offered;
    /* Interrupt for each request. */
    rings.available.used_event = offered - 1;
}

void virtio_kick(u16 queue)
{
    asm volatile("mfence" : : : "memory");
    *(volatile u16 *)(virtio.notify + 4 * queue) = queue;
}

int wait_used(u16 count)
{
    u32 begin = pm_timer();
    for (u32 spins = 0; rings.used.index != count; spins++) {
        pause();
        if (spins % 64 == 63) {
            if (virtio_status() & NEEDS_RESET || pm_timer() - begin > 10u * PM_TIMER_HZ)
                return 0;
        }
    }
    return 1;
}
