/* SPDX-License-Identifier: Apache-2.0 */
#include "queues.h"

volatile struct rings queues[QUEUES_MAX];

static void set_up(u16 index)
{
    volatile u8 *bytes = (volatile u8 *)&queues[index];
    for (u32 i = 0; i < sizeof queues[index]; i++)
        bytes[i] = 0;
    virtio_write(QUEUE_SELECT, 2, index);
    virtio_write(QUEUE_SIZE, 2, SIZE);
    virtio_write(QUEUE_DESCRIPTORS, 8, (u64)queues[index].descriptors);
    virtio_write(QUEUE_AVAILABLE, 8, (u64)&queues[index].available);
    virtio_write(QUEUE_USED, 8, (u64)&queues[index].used);
    virtio_write(QUEUE_ENABLE, 2, 1);
}

int queues_start(u32 function, u32 device, u16 count)
{
    if (!virtio_find(function) || pci_read(function, 2, 2) != device)
        return 0;
    virtio_reset();
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER);
    for (u32 half = 0; half < 2; half++) {
        virtio_write(OFFER_SELECT, 4, half);
        u32 accepted = mmio_read(virtio.common + OFFER);
        virtio_write(ACCEPT_SELECT, 4, half);
        virtio_write(ACCEPT, 4, accepted);
    }
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for (u16 index = 0; index < count; index++)
        set_up(index);
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

void queue_describe(u16 queue, u16 index, const volatile void *address, u32 len, u16 flags, u16 next)
{
    queues[queue].descriptors[index].address = (u64)address;
    queues[queue].descriptors[index].len = len;
    queues[queue].descriptors[index].flags = flags;
    queues[queue].descriptors[index].next = next;
}

void queue_give(u16 queue, u16 head)
{
    queues[queue].available.ring[queues[queue].available.index % SIZE] = head;
    barrier();
    queues[queue].available.index++;
    virtio_kick(queue);
}

int queue_wait(u16 queue)
{
    for (u32 waited = 0; queues[queue].used.index != queues[queue].available.index; waited++) {
        if (virtio_status() & NEEDS_RESET || waited == 100000)
            return 0;
        delay_us(100);
    }
    return 1;
}
