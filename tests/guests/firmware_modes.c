/* SPDX-License-Identifier: Apache-2.0 */
/* Modes about what firmware uses: the shadow area, the configuration device; and the port of a panicking kernel. */

#include "guest.h"

enum { PAM = 0x90, FW_CFG = 0x510, DIRECTORY = 0x19, PANIC = 0x505, PANICKED = 1 };

void mode_panic(void)
{
    print("panic: understood %x\n", in8(PANIC));
    out8(PANIC, PANICKED);
    halt();
}

static void set_pam(u32 number, u8 value)
{
    u32 address = 0x80000000 | ((PAM + number) & ~3u);
    out32(0xcf8, address);
    out8(0xcfc + ((PAM + number) & 3), value);
}

/* One segment, 0xd0000 to 0xd3fff (PAM3, lower half), in all its states; its neighbour is left alone. */
void mode_shadow(void)
{
    volatile u32 *segment = (u32 *)0xd0000, *neighbour = (u32 *)0xd4000;
    *segment = 0x11111111;
    *neighbour = 0x44444444;
    set_pam(3, 0x31);
    *segment = 0x22222222;
    print("read-only: %x\n", *segment);
    set_pam(3, 0x30);
    *segment = 0x33333333;
    print("nothing: %x\n", *segment);
    set_pam(3, 0x33);
    print("back: %x", *segment);
    *segment = 0x55555555;
    print(", written: %x, neighbour: %x\n", *segment, *neighbour);
    /* Back and forth, while nothing is lost. */
    for (u32 i = 0; i < option("rounds", 100); i++) {
        set_pam(3, i & 1 ? 0x33 : 0x31);
        if (*segment != 0x55555555)
            print("lost: %x\n", *segment);
    }
    print("shadow: done\n");
}

/* Lists the configuration device's files: name and size. */
void mode_fw_cfg(void)
{
    out16(FW_CFG, 0);
    for (u32 i = 0; i < 4; i++)
        put(in8(FW_CFG + 1));
    out16(FW_CFG, DIRECTORY);
    u32 count = 0;
    for (u32 i = 0; i < 4; i++)
        count = count << 8 | in8(FW_CFG + 1);
    print(": %u files\n", count);
    while (count--) {
        u32 size = 0;
        for (u32 i = 0; i < 4; i++)
            size = size << 8 | in8(FW_CFG + 1);
        for (u32 i = 0; i < 4; i++)
            in8(FW_CFG + 1);
        char name[57] = { 0 };
        for (u32 i = 0; i < 56; i++)
            name[i] = in8(FW_CFG + 1);
        print("%s %u\n", name, size);
    }
}
