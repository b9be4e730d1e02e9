/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that tries what it should not reach, and then what it should; and one that is reached.
 *
 * net-reach first=A count=N port=P to=B: sends TCP SYN and a UDP datagram to port P of N addresses from A on, of
 * the kinds that a host may take for itself, then SYN to B until an answer comes. Addresses are numbers. Prints who
 * answered.
 * net-serve port=P to=B: lets itself be seen by a datagram to B, takes TCP connections to port P and greets whoever says
 *   something. Never ends. */

#include "net.h"

enum { SYN = 2, RST = 4, PUSH = 8, ACK = 16, TCP = 6, UDP = 17 };
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

/* The headers of a packet of `len` bytes beyond IP's, and zeros for those (RFC 791). */
static void begin(u32 to, u8 protocol, u32 len)
{
    volatile u8 *ip = net_out + 14;
    for (u32 i = 0; i < 34 + len; i++)
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
}

/* The checksum at a place of what follows IP's header, and off it goes. */
static void finish(u8 protocol, u32 len, u32 checksum)
{
    volatile u8 *ip = net_out + 14, *inner = ip + 20;
    put16(inner + checksum, folded(sum(ip + 12, 8) + protocol + len + sum(inner, len)));
    net_send(34 + len);
}

/* A segment with what stands in `text` (RFC 9293). */
static void segment(u32 to, u16 port, u16 own_port, u8 flags, u32 number, u32 acknowledged, const char *text)
{
    volatile u8 *tcp = net_out + 34;
    u32 len = 20;
    while (text[len - 20])
        len++;
    begin(to, TCP, len);
    put16(tcp, own_port);
    put16(tcp + 2, port);
    put32(tcp + 4, number);
    put32(tcp + 8, acknowledged);
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    put16(tcp + 14, 8192);
    copy(tcp + 20, (const volatile u8 *)text, len - 20);
    finish(TCP, len, 16);
}

/* A SYN, or a datagram (RFC 768). */
static void send_to(u32 to, u16 port, u8 protocol)
{
    volatile u8 *udp = net_out + 34;
    if (protocol == TCP) {
        segment(to, port, 40000, SYN, 1000, 0, "");
        return;
    }
    begin(to, UDP, 12);
    put16(udp, 40000);
    put16(udp + 2, port);
    put16(udp + 4, 12);
    finish(UDP, 12, 6);
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

static void serve(const volatile u8 *frame, u16 port)
{
    u32 from = get32(frame + 26), number = get32(frame + 38), acknowledged = get32(frame + 42);
    u16 theirs = frame[34] << 8 | frame[35], asked = frame[36] << 8 | frame[37];
    u32 said = (frame[16] << 8 | frame[17]) - 20 - (frame[46] >> 4) * 4;
    u8 flags = frame[47];
    int is_tcp = frame[12] == 8 && frame[13] == 0 && frame[23] == TCP;
    if (is_tcp)
        copy(gateway, frame + 6, 6);
    net_done();
    if (!is_tcp || asked != port || flags & RST)
        return;
    if (flags & SYN) {
        print("net: asked by %u.%u.%u.%u\n", from >> 24, from >> 16 & 255, from >> 8 & 255, from & 255);
        segment(from, theirs, port, SYN | ACK, 1000, number + 1, "");
    } else if (said) {
        segment(from, theirs, port, PUSH | ACK, acknowledged, number + said, "welcome\n");
    }
}

void mode_net_serve(void)
{
    u16 port = option("port", 22);
    u32 len;
    if (!net_start())
        return;
    do
        ask_for_gateway();
    while (!wait_for(0));
    send_to(option("to", 0), 9, UDP);
    print("net: serving\n");
    for (;;) {
        const volatile u8 *frame = net_receive(&len);
        if (frame)
            serve(frame, port);
    }
}
