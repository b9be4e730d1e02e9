/* SPDX-License-Identifier: Apache-2.0 */
/* Modes about ways to end and to begin again. */

#include "guest.h"

/* Polls PM1_STS. */
void mode_wait_power_button(void)
{
    print("waiting\n");
    while (!(in16(PM1_STATUS) & POWER_BUTTON))
        delay_us(10000);
    print("power button\n");
}

static void button_handler(void)
{
    if (in16(PM1_STATUS) & POWER_BUTTON)
        out16(PM1_STATUS, POWER_BUTTON);
}

/* Sleeps until the system control interrupt: level-triggered, pin 9. */
void mode_sci(void)
{
    interrupts_init();
    on_interrupt(9, button_handler);
    route(9, 9, 1);
    out16(PM1_ENABLE, POWER_BUTTON);
    print("sleeping\n");
    while (!interrupt_count(9))
        wait_for_interrupt();
    print("sci: %u, status %x\n", interrupt_count(9), in16(PM1_STATUS));
}

/* Resets once, by the means named: cf9, i8042. The CMOS memory has a battery and remembers. */
void mode_reset_once(void)
{
    enum { SCRATCH = 0x40, MARK = 0x5a };
    u64 *in_bss = (u64 *)0x300000;
    if (cmos_read(SCRATCH) == MARK) {
        print("second boot: rsdp %s, pm1 enable %x\n", boot_info->rsdp ? "there" : "missing", in16(PM1_ENABLE));
        cmos_write(SCRATCH, 0);
        return;
    }
    print("first boot\n");
    cmos_write(SCRATCH, MARK);
    *in_bss = 1;
    out16(PM1_ENABLE, POWER_BUTTON);
    if (has_word("i8042"))
        out8(0x64, 0xfe);
    else
        out8(0xcf9, 6);
    halt();
}

/* An exception without an interrupt table, three times over. */
void mode_triple_fault(void)
{
    static const struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) none = { 0, 0 };
    print("triple fault\n");
    asm volatile("lidt %0; ud2" : : "m"(none));
}

/* Runs into memory that is none: KVM cannot emulate what it cannot fetch. */
void mode_bad_instruction(void)
{
    print("jumping\n");
    ((void (*)(void))0xd0000000)();
}
