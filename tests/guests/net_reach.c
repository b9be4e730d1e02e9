/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that tries what it should not reach, and then what it should.
 *
 * net-reach first=A count=N port=P to=B: sends TCP SYN and a UDP datagram to port P of N addresses from A on, of
 * the kinds that a host may take for itself, then SYN to B until an answer comes. Addresses are numbers. Prints who
 * answered. */

#include "net.h"

enum { SYN = 2, RST = 4, ACK = 16, TCP = 6, UDP = 17 };
static const u8 everybody[6] = { 255, 255, 255, 255, 255, 255 };
static const u8 own[4] = { 10, 77, 0, 2 };
static u8 gateway[6];

static void put16(volatile u8 *to, u32 value)
{
    to[0] = value >> 8;
    to[1] = value;
}

static void put32(volatile u8 *to, u32 value)
{
    put16(to, value >> 16);
    put16(to + 2, value);
}

static u32 get32(const volatile u8 *from)
{
    return (u32)from[0] << 24 | from[1] << 16 | from[2] << 8 | from[3];
}

static u32 sum(const volatile u8 *from, u32 len)
{
    u32 total = 0;
    for (u32 i = 0; i < len; i++)
        total += i % 2 ? from[i] : (u32)from[i] << 8;
    return total;
}

static u16 folded(u32 total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return ~total;
}

/* RFC 791, 9293, 768. */
static void send_to(u32 to, u16 port, u8 protocol)
{
    volatile u8 *ip = net_out + 14, *inner = ip + 20;
    u32 len = protocol == TCP ? 20 : 12;
    for (u32 i = 0; i < 60; i++)
        net_out[i] = 0;
    copy(net_out, gateway, 6);
    copy(net_out + 6, net_mac, 6);
    put16(net_out + 12, 0x0800);
    put16(ip, 0x4500);
    put16(ip + 2, 20 + len);
    ip[8] = 64;
    ip[9] = protocol;
    copy(ip + 12, own, 4);
    put32(ip + 16, to);
    put16(ip + 10, folded(sum(ip, 20)));
    put16(inner, 40000);
    put16(inner + 2, port);
    if (protocol == TCP) {
        put32(inner + 4, 1000);
        inner[12] = 5 << 4;
        inner[13] = SYN;
        put16(inner + 14, 8192);
    } else {
        put16(inner + 4, len);
    }
    put16(inner + (protocol == TCP ? 16 : 6), folded(sum(ip + 12, 8) + protocol + len + sum(inner, len)));
    net_send(34 + len);
}

static void ask_for_gateway(void)
{
    for (u32 i = 0; i < 60; i++)
        net_out[i] = 0;
    copy(net_out, everybody, 6);
    copy(net_out + 6, net_mac, 6);
    put16(net_out + 12, 0x0806);
    put32(net_out + 14, 0x00010800);
    put32(net_out + 18, 0x06040001);
    copy(net_out + 22, net_mac, 6);
    copy(net_out + 28, own, 4);
    put32(net_out + 38, 0x0a4d0001);
    net_send(42);
}

/* 1 for an answer from `to`, which is printed. */
static int hear(u32 to)
{
    u32 len;
    const volatile u8 *frame = net_receive(&len);
    int answered = 0;
    if (!frame)
        return 0;
    if (frame[12] == 8 && frame[13] == 6 && frame[21] == 2) {
        copy(gateway, frame + 22, 6);
        answered = to == 0;
    } else if (frame[12] == 8 && frame[13] == 0 && (frame[23] == TCP || frame[23] == UDP)) {
        u32 from = get32(frame + 26);
        const char *what = frame[23] == UDP ? "datagram" : frame[47] & RST ? "closed" : "open";
        print("net: %u.%u.%u.%u %s\n", from >> 24, from >> 16 & 255, from >> 8 & 255, from & 255, what);
        answered = from == to;
    }
    net_done();
    return answered;
}

/* Waits a second for an answer. */
static int wait_for(u32 to)
{
    for (u32 i = 0; i < 1000; i++) {
        if (hear(to))
            return 1;
        delay_us(1000);
    }
    return 0;
}

void mode_net_reach(void)
{
    u32 first = option("first", 0), count = option("count", 0), to = option("to", 0);
    u16 port = option("port", 80);
    if (!net_start())
        return;
    do
        ask_for_gateway();
    while (!wait_for(0));
    for (u32 i = 0; i < count; i++) {
        send_to(first + i, port, TCP);
        send_to(first + i, port, UDP);
    }
    send_to(0, port, TCP);
    send_to(0, port, UDP);
    do
        send_to(to, port, TCP);
    while (!wait_for(to));
    print("net: done\n");
    for (;;)
        pause();
}
