/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that answer on network interface 0.
 *
 * net-echo count=N address=A: answers ARP and ICMP echo for address A (a number; 10.99.0.2 without it) until N
 * echoes were answered. */

#include "net.h"

static u8 address[4];

/* Ethernet: back to the sender. */
static void turn_round(const volatile u8 *frame, u32 len)
{
    copy(net_out, frame, len);
    copy(net_out, frame + 6, 6);
    copy(net_out + 6, net_mac, 6);
}

/* RFC 826: who has 10.99.0.2? */
static void arp(const volatile u8 *frame)
{
    volatile u8 *reply = net_out;
    if (frame[21] != 1 || !same(frame + 38, address, 4))
        return;
    turn_round(frame, 42);
    reply[21] = 2;
    copy(reply + 22, net_mac, 6);
    copy(reply + 28, address, 4);
    copy(reply + 32, frame + 22, 10);
    net_send(42);
}

/* RFC 792: an echo request becomes a reply by its type; the checksum changes by as much. */
static int icmp(const volatile u8 *frame, u32 len)
{
    volatile u8 *reply = net_out;
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
    net_send(len);
    return 1;
}

void mode_net_echo(void)
{
    u64 count = option("count", 1);
    u64 own = option("address", 0x0a630002);
    for (u32 i = 0; i < 4; i++)
        address[i] = own >> (24 - 8 * i);
    if (!net_start())
        return;
    for (u64 echoes = 0; echoes < count; ) {
        if (net_broken()) {
            print("net: needs a reset\n");
            return;
        }
        u32 len;
        const volatile u8 *frame = net_receive(&len);
        if (!frame) {
            pause();
            continue;
        }
        if (frame[12] == 8 && frame[13] == 6)
            arp(frame);
        else if (frame[12] == 8 && frame[13] == 0)
            echoes += icmp(frame, len);
        net_done();
    }
    print("net: %lu echoes\n", count);
}
