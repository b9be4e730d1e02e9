/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that answer on network interface 0.
 *
 * net-echo count=N address=A: answers ARP and ICMP echo for address A (a number; 10.99.0.2 without it) until N
 * echoes were answered.
 * net-ping to=A from=B count=N: sends ICMP echo requests until N were answered; asks again when one is lost. */

#include "net.h"

static u8 address[4];

static void set(u8 *to, u64 number)
{
    for (u32 i = 0; i < 4; i++)
        to[i] = number >> (24 - 8 * i);
}

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
    set(address, option("address", 0x0a630002));
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

static u8 wanted[4], theirs[6];

/* ARP until the other's hardware address is known, then ICMP. */
static void ask(int known)
{
    for (u32 i = 0; i < 60; i++)
        net_out[i] = 0;
    for (u32 i = 0; i < 6; i++)
        net_out[i] = known ? theirs[i] : 0xff;
    copy(net_out + 6, net_mac, 6);
    net_out[12] = 8;
    if (!known) {
        net_out[13] = 6;
        net_out[15] = net_out[21] = 1;
        net_out[16] = 8;
        net_out[18] = 6;
        net_out[19] = 4;
        copy(net_out + 22, net_mac, 6);
        copy(net_out + 28, address, 4);
        copy(net_out + 38, wanted, 4);
        net_send(42);
        return;
    }
    net_out[14] = 0x45;
    net_out[17] = 28;
    net_out[22] = 64;
    net_out[23] = 1;
    copy(net_out + 26, address, 4);
    copy(net_out + 30, wanted, 4);
    net_out[34] = 8;
    net_out[36] = 0xf7; /* ~0x0800 */
    net_out[37] = 0xff;
    net_send(42);
}

/* Waits up to half a second; 1 for an answer, 2 for the other's address. */
static int answer_comes(void)
{
    for (u32 i = 0; i < 500; i++) {
        u32 len;
        const volatile u8 *frame = net_receive(&len);
        int what = 0;
        if (!frame) {
            delay_us(1000);
            continue;
        }
        if (frame[12] == 8 && frame[13] == 6 && frame[21] == 2 && same(frame + 28, wanted, 4)) {
            copy(theirs, frame + 22, 6);
            what = 2;
        } else if (frame[12] == 8 && frame[13] == 0 && frame[23] == 1 && frame[34] == 0 &&
                   same(frame + 26, wanted, 4)) {
            what = 1;
        }
        net_done();
        if (what)
            return what;
    }
    return 0;
}

void mode_net_ping(void)
{
    u64 count = option("count", 1), answers = 0;
    set(wanted, option("to", 0));
    set(address, option("from", 0));
    if (!net_start())
        return;
    for (int known = 0; answers < count; ) {
        ask(known);
        int what = answer_comes();
        known = what != 0;
        if (what == 1 && (++answers % 20 == 0 || answers == count))
            print("net: %lu answers\n", answers);
        delay_us(2000);
    }
}
