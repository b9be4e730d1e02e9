/* SPDX-License-Identifier: Apache-2.0 */
/* watchdog count=N: sets the watchdog N times, each time before it ends, and then no more. Says at the start whether it
 * was the watchdog that ended the guest before. With the word "hostile" it does what no driver would, first. */

#include "virtio.h"

enum { WATCHDOG_FUNCTION = 9 << 3, CONFIG = 0x60, LOCK = 0x68, RELOAD = 0x0c };
enum { BEGIN = 1 << 8, ENDED = 1 << 9, ENABLED = 1 << 1 };

static u64 bar;

static void set_register(u32 offset, u32 value)
{
    *(volatile u16 *)(bar + RELOAD) = 0x80;
    *(volatile u16 *)(bar + RELOAD) = 0x86;
    if (offset == RELOAD)
        *(volatile u16 *)(bar + RELOAD) = value;
    else
        mmio_write(bar + offset, value);
}

static void play(void)
{
    for (u32 round = 0; round < 2000; round++) {
        set_register(round % 16, round * 2654435761u);
        pci_write(WATCHDOG_FUNCTION, CONFIG, 2, round & 0x24);
        pci_write(WATCHDOG_FUNCTION, LOCK, 1, round & 6);
    }
    pci_write(WATCHDOG_FUNCTION, LOCK, 1, 0);
    print("watchdog: played\n");
}

void mode_watchdog(void)
{
    if (pci_read(WATCHDOG_FUNCTION, 0, 4) != 0x25ab8086) {
        print("watchdog: none\n");
        halt();
    }
    bar = pci_read(WATCHDOG_FUNCTION, 0x10, 4) & ~0xfu;
    pci_write(WATCHDOG_FUNCTION, 4, 2, 2);
    print("watchdog: ended before: %u\n", mmio_read(bar + RELOAD) & ENDED ? 1 : 0);
    set_register(RELOAD, ENDED);
    if (has_word("hostile"))
        play();
    pci_write(WATCHDOG_FUNCTION, CONFIG, 2, 3);
    set_register(0, 512);
    set_register(4, 512);
    set_register(RELOAD, BEGIN);
    pci_write(WATCHDOG_FUNCTION, LOCK, 1, ENABLED);
    u32 count = option("count", 3);
    for (u32 times = 0; times < count; times++) {
        delay_us(300000);
        set_register(RELOAD, BEGIN);
        print("watchdog: set\n");
    }
    print("watchdog: no more\n");
    halt();
}
