/* SPDX-License-Identifier: Apache-2.0 */
/* A driver for network interface 0: one buffer a frame, one queue pair, no offloads, polled. It takes mergeable buffers,
 * as those do for which a kernel may receive, and has no frame that needs more than one. */

#include "net.h"
#include "virtio.h"

enum { RX = 0, TX = 1, CONTROL = 2, FRAME = 2048, HEADER = 12 };
enum { OFFLOADS = 1 << 0 | 1 << 1 | 0x7f << 7 | 1 << 22 };

static volatile struct rings receive, transmit;
static volatile u8 frames[SIZE][FRAME] __attribute__((aligned(4096)));
static volatile u8 answer[FRAME] __attribute__((aligned(4096)));
static u16 sent;
static u16 seen;
u8 net_mac[6];
int net_control;
static volatile struct rings control;
static volatile u8 order[64];
static u16 orders;
volatile u8 *const net_out = answer + HEADER;

static void queue(u16 index, volatile struct rings *rings)
{
    virtio_write(QUEUE_SELECT, 2, index);
    virtio_write(QUEUE_SIZE, 2, SIZE);
    virtio_write(QUEUE_DESCRIPTORS, 8, (u64)rings->descriptors);
    virtio_write(QUEUE_AVAILABLE, 8, (u64)&rings->available);
    virtio_write(QUEUE_USED, 8, (u64)&rings->used);
    virtio_write(QUEUE_ENABLE, 2, 1);
}

static void give(u16 buffer)
{
    receive.descriptors[buffer].address = (u64)frames[buffer];
    receive.descriptors[buffer].len = FRAME;
    receive.descriptors[buffer].flags = DESCRIPTOR_WRITE;
    receive.available.ring[receive.available.index % SIZE] = buffer;
    barrier();
    receive.available.index++;
}

u32 net_command(const u8 *bytes, u32 len)
{
    volatile u8 *ack = order + len;
    copy(order, bytes, len);
    *ack = 0xff;
    control.descriptors[0].address = (u64)order;
    control.descriptors[0].len = len;
    control.descriptors[0].flags = DESCRIPTOR_NEXT;
    control.descriptors[0].next = 1;
    control.descriptors[1].address = (u64)ack;
    control.descriptors[1].len = 1;
    control.descriptors[1].flags = DESCRIPTOR_WRITE;
    control.available.ring[orders % SIZE] = 0;
    barrier();
    control.available.index = ++orders;
    virtio_kick(CONTROL);
    while (control.used.index != orders && !(virtio_status() & NEEDS_RESET))
        pause();
    return *ack;
}

int net_start(void)
{
    if (!virtio_find(3 << 3)) {
        print("net: none\n");
        return 0;
    }
    virtio_reset();
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER);
    for (u32 half = 0; half < 2; half++) {
        virtio_write(OFFER_SELECT, 4, half);
        u32 accepted = mmio_read(virtio.common + OFFER) & ~(half ? 0 : (u32)OFFLOADS);
        virtio_write(ACCEPT_SELECT, 4, half);
        virtio_write(ACCEPT, 4, accepted);
    }
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(virtio_status() & FEATURES_OK)) {
        print("net: features refused\n");
        return 0;
    }
    for (u32 i = 0; i < 6; i++)
        net_mac[i] = *(volatile u8 *)(virtio.device + i);
    queue(RX, &receive);
    queue(TX, &transmit);
    if (net_control)
        queue(CONTROL, &control);
    for (u16 buffer = 0; buffer < SIZE; buffer++)
        give(buffer);
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    virtio_kick(RX);
    print("net: mac %x:%x:%x:%x:%x:%x mtu %u\n", net_mac[0], net_mac[1], net_mac[2], net_mac[3], net_mac[4], net_mac[5],
          (u32)*(volatile u16 *)(virtio.device + 10));
    return 1;
}

void net_send(u32 len)
{
    for (u32 i = 0; i < HEADER; i++)
        answer[i] = 0;
    transmit.descriptors[0].address = (u64)answer;
    transmit.descriptors[0].len = HEADER + len;
    transmit.descriptors[0].flags = 0;
    transmit.available.ring[sent % SIZE] = 0;
    barrier();
    transmit.available.index = ++sent;
    virtio_kick(TX);
    while (transmit.used.index != sent && !(virtio_status() & NEEDS_RESET))
        pause();
}

void copy(volatile u8 *to, const volatile u8 *from, u32 len)
{
    for (u32 i = 0; i < len; i++)
        to[i] = from[i];
}

int same(const volatile u8 *a, const u8 *b, u32 len)
{
    for (u32 i = 0; i < len; i++)
        if (a[i] != b[i])
            return 0;
    return 1;
}

const volatile u8 *net_receive(u32 *len)
{
    if (receive.used.index == seen)
        return 0;
    u16 buffer = receive.used.ring[seen % SIZE].id;
    *len = receive.used.ring[seen % SIZE].len - HEADER;
    return frames[buffer] + HEADER;
}

void net_done(void)
{
    give(receive.used.ring[seen++ % SIZE].id);
    virtio_kick(RX);
}

int net_broken(void)
{
    return (virtio_status() & NEEDS_RESET) != 0;
}

void net_break(void)
{
    transmit.available.ring[sent % SIZE] = 300;
    barrier();
    transmit.available.index = ++sent;
    virtio_kick(TX);
}
