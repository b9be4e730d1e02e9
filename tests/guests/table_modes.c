/* SPDX-License-Identifier: Apache-2.0 */
/* Modes about what the host tells at boot: memory map, modules, ACPI tables, the clock. */

#include "guest.h"

/* The memory map and the first module, with the sum of its bytes. */
void mode_memory(void)
{
    const struct memory_map_entry *map = (void *)boot_info->memory_map;
    for (u32 i = 0; i < boot_info->memory_map_entries; i++)
        print("map: %lx %lx %u\n", map[i].address, map[i].size, map[i].type);
    if (boot_info->modules) {
        const struct module *module = (void *)boot_info->module_list;
        const u8 *bytes = (void *)module->address;
        u64 sum = 0;
        for (u64 i = 0; i < module->size; i++)
            sum += bytes[i];
        print("module: %lu bytes, sum %lu\n", module->size, sum);
    }
    volatile u64 *last = (u64 *)(map[2].address + map[2].size - 8);
    *last = 0x0123456789abcdef;
    print("last word: %lx\n", *last);
}

/* fill equal=MIB unlike=MIB seed=N: writes to that much memory from 16 MiB on, pages that are no two alike within the
 * guest; another guest has the same `equal` ones, and the same `unlike` ones only with the same seed. Then sleeps, or
 * with the word flood prints lines. */
void mode_fill(void)
{
    u64 page = 16 << 20, equal = page + (option("equal", 0) << 20), end = equal + (option("unlike", 0) << 20);
    u64 seed = option("seed", 0) << 40 | 1UL << 60;
    for (; page < end; page += 4096)
        *(volatile u64 *)page = page < equal ? page : page | seed;
    print("filled\n");
    if (has_word("flood"))
        mode_flood();
    halt();
}

static int valid(const u8 *table, u32 length)
{
    u8 sum = 0;
    for (u32 i = 0; i < length; i++)
        sum += table[i];
    return sum == 0;
}

static u32 get32(const u8 *at) { return *(const u32 *)at; }
static u64 get64(const u8 *at) { return get32(at) | (u64)get32(at + 4) << 32; }

static void table(const u8 *at)
{
    print("table: %c%c%c%c, %u bytes, %s\n", at[0], at[1], at[2], at[3], get32(at + 4),
          valid(at, get32(at + 4)) ? "valid" : "checksum wrong");
}

/* Walks from the RSDP; a kernel that searches for it looks in the same place. */
void mode_acpi(void)
{
    const u8 *rsdp = (void *)boot_info->rsdp;
    print("rsdp: %s, at %lx\n", valid(rsdp, 20) && valid(rsdp, 36) ? "valid" : "checksum wrong", (u64)rsdp);
    const u8 *xsdt = (void *)get64(rsdp + 24);
    table(xsdt);
    for (u32 i = 36; i < get32(xsdt + 4); i += 8) {
        const u8 *entry = (void *)get64(xsdt + i);
        table(entry);
        if (get32(entry) == 0x50434146) { /* FACP */
            table((void *)get64(entry + 140));
            print("pm1a control at %x, timer at %x, reset %x at %lx\n", get32(entry + 64), get32(entry + 76),
                  entry[128], get64(entry + 120));
        }
    }
}

/* The real-time clock, once it does not change. */
void mode_clock(void)
{
    while (cmos_read(0x0a) & 0x80)
        pause();
    print("clock: %x%x-%x-%x %x:%x:%x\n", cmos_read(0x32), cmos_read(9), cmos_read(8), cmos_read(7), cmos_read(4),
          cmos_read(2), cmos_read(0));
}
