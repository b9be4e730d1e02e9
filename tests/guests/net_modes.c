/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use network interface 0: one buffer a frame, one queue pair, no offloads, polled.
 *
 * net-echo count=N: answers ARP and ICMP echo for 10.99.0.2 until N echoes were answered. */

#include "virtio.h"

enum { RX = 0, TX = 1, FRAME = 2048, HEADER = 12 };
enum { OFFLOADS = 1 << 0 | 1 << 1 | 0x7f << 7 | 1 << 15 | 1 << 22 };

static volatile struct rings receive, transmit;
static volatile u8 frames[SIZE][FRAME] __attribute__((aligned(4096)));
static volatile u8 answer[FRAME] __attribute__((aligned(4096)));
static u16 sent;
static u8 mac[6];
static const u8 address[4] = { 10, 99, 0, 2 };

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

static int start(void)
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
        mac[i] = *(volatile u8 *)(virtio.device + i);
    queue(RX, &receive);
    queue(TX, &transmit);
    for (u16 buffer = 0; buffer < SIZE; buffer++)
        give(buffer);
    virtio_write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    virtio_kick(RX);
    print("net: mac %x:%x:%x:%x:%x:%x mtu %u\n", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5],
          (u32)*(volatile u16 *)(virtio.device + 10));
    return 1;
}

/* Sends what stands in `answer`, `len` bytes behind the header; waits until the device has it. */
static void send(u32 len)
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

static void copy(volatile u8 *to, const volatile u8 *from, u32 len)
{
    for (u32 i = 0; i < len; i++)
        to[i] = from[i];
}

static int same(const volatile u8 *a, const u8 *b, u32 len)
{
    for (u32 i = 0; i < len; i++)
        if (a[i] != b[i])
            return 0;
    return 1;
}

/* Ethernet: back to the sender. */
static void turn_round(const volatile u8 *frame, u32 len)
{
    copy(answer + HEADER, frame, len);
    copy(answer + HEADER, frame + 6, 6);
    copy(answer + HEADER + 6, mac, 6);
}

/* RFC 826: who has 10.99.0.2? */
static void arp(const volatile u8 *frame)
{
    volatile u8 *reply = answer + HEADER;
    if (frame[21] != 1 || !same(frame + 38, address, 4))
        return;
    turn_round(frame, 42);
    reply[21] = 2;
    copy(reply + 22, mac, 6);
    copy(reply + 28, address, 4);
    copy(reply + 32, frame + 22, 10);
    send(42);
}

/* RFC 792: an echo request becomes a reply by its type; the checksum changes by as much. */
static int icmp(const volatile u8 *frame, u32 len)
{
    volatile u8 *reply = answer + HEADER;
    if (frame[14] != 0x45 || frame[23] != 1 || frame[34] != 8 || !same(frame + 30, address, 4))
        return 0;
    turn_round(frame, len);
    copy(reply + 26, frame + 30, 4);
    copy(reply + 30, frame + 26, 4);
    reply[34] = 0;
    u32 sum = (frame[36] << 8 | frame[37]) + 0x0800;
    sum = (sum & 0xffff) + (sum >> 16);
    reply[36] = sum >> 8;
    reply[37] = sum;
    send(len);
    return 1;
}

void mode_net_echo(void)
{
    u64 count = option("count", 1);
    u16 seen = 0;
    if (!start())
        return;
    for (u64 echoes = 0; echoes < count; ) {
        if (virtio_status() & NEEDS_RESET) {
            print("net: needs a reset\n");
            return;
        }
        if (receive.used.index == seen) {
            pause();
            continue;
        }
        u16 buffer = receive.used.ring[seen % SIZE].id;
        u32 len = receive.used.ring[seen % SIZE].len - HEADER;
        const volatile u8 *frame = frames[buffer] + HEADER;
        seen++;
        if (frame[12] == 8 && frame[13] == 6)
            arp(frame);
        else if (frame[12] == 8 && frame[13] == 0)
            echoes += icmp(frame, len);
        give(buffer);
        virtio_kick(RX);
    }
    print("net: %lu echoes\n", count);
}
