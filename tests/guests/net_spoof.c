/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that says it is somebody else, and one that listens to others.
 *
 * net-break: offers a descriptor that does not exist, and says when the device needs a reset.
 * net-sort: is in the group 01:00:5e:00:00:05, and says the same of what is for that, for itself and for all.
 * net-hear: is promiscuous, and says the letter of each frame of 60 bytes that ends so, whoever it was for.
 * net-spoof: sends frames to everybody, of 60 bytes each, that end with "vmbus" and a letter: a capital for what its
 * own address, 10.99.0.2 and its MAC, may say. */

#include "net.h"

static const u8 own[4] = { 10, 99, 0, 2 }, other[4] = { 10, 99, 0, 9 }, none[4] = { 0, 0, 0, 0 };
static u8 stranger[6];

static void begin(const u8 *from, u32 type)
{
    for (u32 i = 0; i < 60; i++)
        net_out[i] = i < 6 ? 0xff : 0;
    copy(net_out + 6, from, 6);
    net_out[12] = type >> 8;
    net_out[13] = type;
}

static void end(char letter)
{
    static const u8 mark[5] = { 'v', 'm', 'b', 'u', 's' };
    copy(net_out + 54, mark, 5);
    net_out[59] = letter;
    net_send(60);
}

/* RFC 826 and 903: of Ethernet and IPv4, from an alleged sender. */
static void begin_arp(u32 type, u8 operation, const u8 *hardware)
{
    begin(net_mac, type);
    net_out[15] = 1;
    net_out[16] = 8;
    net_out[18] = 6;
    net_out[19] = 4;
    net_out[21] = operation;
    copy(net_out + 22, hardware, 6);
}

static void arp(const u8 *hardware, const u8 *address, char letter)
{
    begin_arp(0x0806, 1, hardware);
    copy(net_out + 28, address, 4);
    copy(net_out + 38, other, 4);
    end(letter);
}

static void reverse(const u8 *hardware, char letter)
{
    begin_arp(0x8035, 3, hardware);
    copy(net_out + 32, hardware, 6);
    end(letter);
}

static void udp(const u8 *from, const u8 *address, u8 port, char letter)
{
    begin(from, 0x0800);
    net_out[14] = 0x45;
    net_out[17] = 46;
    net_out[22] = 64;
    net_out[23] = 17;
    copy(net_out + 26, address, 4);
    copy(net_out + 30, other, 4);
    net_out[35] = 68;
    net_out[37] = port;
    net_out[39] = 26;
    /* A bridge may look whether the header is whole. */
    u32 sum = 0;
    for (u32 i = 14; i < 34; i += 2)
        sum += net_out[i] << 8 | net_out[i + 1];
    sum = (sum & 0xffff) + (sum >> 16);
    net_out[24] = ~sum >> 8;
    net_out[25] = ~sum;
    end(letter);
}

void mode_net_spoof(void)
{
    if (!net_start())
        return;
    copy(stranger, net_mac, 6);
    stranger[5] ^= 1;
    begin(stranger, 0x88b5);
    end('a'); /* another's MAC address */
    arp(stranger, own, 'b'); /* another's inside ARP */
    arp(net_mac, other, 'c'); /* another's IPv4 address in ARP */
    udp(stranger, own, 9, 'd');
    udp(net_mac, other, 9, 'e'); /* another's IPv4 address */
    udp(net_mac, none, 9, 'f'); /* none, and not DHCP */
    begin(net_mac, 0x8100);
    net_out[15] = 7;
    end('g'); /* another VLAN */
    begin(net_mac, 0x86dd);
    net_out[14] = 0x60;
    net_out[19] = 6;
    net_out[20] = 59;
    net_out[21] = 64;
    net_out[22] = 0xfe;
    net_out[38] = 0xff;
    end('h'); /* IPv6, where only an IPv4 address was given */
    begin(net_mac, 0x88b5);
    end('i'); /* neither */
    reverse(stranger, 'j'); /* another's MAC address asked for, where only an IPv4 address was given */
    reverse(net_mac, 'N');
    arp(net_mac, own, 'J');
    arp(net_mac, none, 'K');
    udp(net_mac, none, 67, 'L');
    udp(net_mac, own, 9, 'M');
    print("net: done\n");
    for (;;)
        pause();
}

static void hear(void)
{
    static const u8 mark[5] = { 'v', 'm', 'b', 'u', 's' };
    for (;;) {
        u32 len;
        const volatile u8 *frame = net_receive(&len);
        if (!frame) {
            pause();
            continue;
        }
        if (len >= 60 && same(frame + 54, mark, 5))
            print("net: heard %c\n", frame[59]);
        net_done();
    }
}

/* virtio 1.2, 5.1.6.5: class 0 is VIRTIO_NET_CTRL_RX, its command 0 PROMISC; class 1 VIRTIO_NET_CTRL_MAC, its command
 * 0 TABLE_SET: a count and addresses of hosts, and of groups. */
void mode_net_hear(void)
{
    static const u8 promiscuous[3] = { 0, 0, 1 };
    net_control = 1;
    if (!net_start())
        return;
    print("net: promiscuous: %u\n", net_command(promiscuous, 3));
    hear();
}

void mode_net_sort(void)
{
    static const u8 sober[3] = { 0, 0, 0 };
    static const u8 table[16] = { 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x01, 0x00, 0x5e, 0x00, 0x00, 0x05 };
    net_control = 1;
    if (!net_start())
        return;
    u32 quiet = net_command(sober, 3);
    print("net: sorted: %u %u\n", quiet, net_command(table, 16));
    hear();
}

void mode_net_break(void)
{
    if (!net_start())
        return;
    net_break();
    while (!net_broken())
        pause();
    print("net: needs a reset\n");
}
