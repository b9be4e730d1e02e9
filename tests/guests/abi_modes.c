/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that say all that a guest can see, for a comparison with `vmbusctl abi dump`: one thing a line, bytes in
 * hexadecimal, in the order of their addresses. */

#include "virtio.h"

enum { PORT_MEMORY = 0xd0000000, PORT_MEMORY_SIZE = 0x2000000 };
enum { FW_CFG = 0x510, DIRECTORY = 0x19, VIRTIO_VENDOR = 0x1af4, EXTENDED = 4096 };

static void put_byte(u8 byte)
{
    put("0123456789abcdef"[byte >> 4]);
    put("0123456789abcdef"[byte & 15]);
}

static void put_bytes(const volatile u8 *bytes, u32 count)
{
    for (u32 i = 0; i < count; i++)
        put_byte(bytes[i]);
    put('\n');
}

/* Every leaf up to the last of each range, and every MSR that does not fault. */
void mode_registers(void)
{
    static const struct { u32 first, last; } ranges[] = {
        { 0, 0x7ff }, { 0x900, 0x11ff }, { 0x40000000, 0x400000ff }, { 0x4b564d00, 0x4b564dff },
        { 0xc0000000, 0xc00002ff }, { 0xc0010000, 0xc00103ff }, { 0xc0011000, 0xc00110ff },
    };
    mode_cpuid();
    catch_faults();
    for (u32 i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        for (u32 msr = ranges[i].first; msr <= ranges[i].last; msr++) {
            u64 value;
            if (read_msr(msr, &value))
                print("msr %x: %lx\n", msr, value);
        }
    }
    print("registers: done\n");
}

static void say_function(u32 function)
{
    if (pci_read(function, 0, 2) == 0xffff)
        return;
    print("pci %x.%x.%x ", function >> 8, function >> 3 & 31, function & 7);
    u32 end = EXTENDED;
    while (end > 256 && !pci_read(function, end - 4, 4))
        end -= 4;
    for (u32 at = 0; at < end; at++)
        put_byte(pci_read(function, at, 1));
    put('\n');
    if (pci_read(function, 0, 2) != VIRTIO_VENDOR)
        return;
    if (function >> 8) { /* in a slot: its BAR has no place yet, and goes into the window of its port */
        pci_write(function, 0x10, 4, PORT_MEMORY + ((function >> 8) - 1) * PORT_MEMORY_SIZE);
        pci_write(function, 0x14, 4, 0);
    }
    if (!virtio_find(function))
        return;
    u64 features = 0;
    for (u32 half = 0; half < 2; half++) {
        virtio_write(OFFER_SELECT, 4, half);
        features |= (u64)mmio_read(virtio.common + OFFER) << (32 * half);
    }
    u32 queues = *(volatile u16 *)(virtio.common + QUEUES);
    print("virtio %x.%x.%x %lx %u %u ", function >> 8, function >> 3 & 31, function & 7, features, queues,
          *(volatile u16 *)(virtio.common + QUEUE_SIZE));
    put_bytes((const volatile u8 *)virtio.device, virtio.device ? virtio.device_len : 0);
}

static u32 fw_cfg_number(u32 bytes)
{
    u32 value = 0;
    while (bytes--)
        value = value << 8 | in8(FW_CFG + 1);
    return value;
}

static void say_item(const char *name, u16 key, u32 size)
{
    out16(FW_CFG, key);
    print("fw-cfg %s ", name);
    while (size--)
        put_byte(in8(FW_CFG + 1));
    put('\n');
}

static void say_fw_cfg(void)
{
    static const struct { const char *name; u16 key; u32 size; } items[] = {
        { "0000", 0, 4 }, { "0001", 1, 4 }, { "0002", 2, 16 }, { "0003", 3, 8 }, { "0004", 4, 2 }, { "0005", 5, 2 },
        { "000e", 0xe, 2 }, { "000f", 0xf, 2 },
    };
    for (u32 i = 0; i < sizeof items / sizeof *items; i++)
        say_item(items[i].name, items[i].key, items[i].size);
    out16(FW_CFG, DIRECTORY);
    u32 count = fw_cfg_number(4);
    say_item("0019", DIRECTORY, 4 + 64 * count);
    for (u32 file = 0; file < count; file++) {
        /* Reading a file loses the place in the directory. */
        out16(FW_CFG, DIRECTORY);
        fw_cfg_number(4);
        for (u32 i = 0; i < file; i++)
            for (u32 j = 0; j < 64; j++)
                in8(FW_CFG + 1);
        u32 size = fw_cfg_number(4), key = fw_cfg_number(4) >> 16;
        char name[57] = { 0 };
        for (u32 i = 0; i < 56; i++)
            name[i] = in8(FW_CFG + 1);
        say_item(name, key, size);
    }
}

/* The buses, the configuration device, the clock's memory, and what firmware would have left in memory: at=ADDRESS
 * len=BYTES, and the same with 1, 2, 3 behind the names. */
void mode_board(void)
{
    static const char *const places[][2] = {
        { "at", "len" }, { "at1", "len1" }, { "at2", "len2" }, { "at3", "len3" },
    };
    const struct memory_map_entry *map = (void *)boot_info->memory_map;
    for (u32 i = 0; i < boot_info->memory_map_entries; i++)
        print("map %lx %lx %u\n", map[i].address, map[i].size, map[i].type);
    for (u32 i = 0; i < 4; i++) {
        u64 at = option(places[i][0], 0);
        if (at) {
            print("memory %lx ", at);
            put_bytes((const volatile u8 *)at, option(places[i][1], 0));
        }
    }
    for (u32 function = 0; function < 256; function++)
        say_function(function);
    for (u32 bus = 1; bus <= 8; bus++)
        say_function(bus << 8);
    say_fw_cfg();
    print("cmos ");
    for (u32 i = 0; i < 128; i++)
        put_byte(cmos_read(i));
    print("\nboard: done\n");
}
