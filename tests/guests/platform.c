/* SPDX-License-Identifier: Apache-2.0 */
/* Power, clocks and interrupts of the machine. */

#include "guest.h"

enum { LOCAL_APIC = 0xfee00000, IO_APIC = 0xfec00000 };
enum { SLEEP_ENABLE = 1 << 13 };

void power_off(void)
{
    out16(PM1_CONTROL, SLEEP_ENABLE); /* S5 is sleep type 0 here; see the DSDT */
    halt();
}

u32 pm_timer(void)
{
    return in32(PM_TIMER);
}

void delay_us(u32 microseconds)
{
    u32 begin = pm_timer(), ticks = (u64)microseconds * PM_TIMER_HZ / 1000000;
    while (pm_timer() - begin < ticks)
        pause();
}

u8 cmos_read(u8 index)
{
    out8(0x70, index);
    return in8(0x71);
}

void cmos_write(u8 index, u8 value)
{
    out8(0x70, index);
    out8(0x71, value);
}

struct gate {
    u16 offset_low, selector;
    u8 stack, type;
    u16 offset_middle;
    u32 offset_high, reserved;
};

extern struct gate idt[256];
extern const u8 interrupt_entries[];

static volatile u32 counts[16];
static void (*handlers[16])(void);

static void set_gate(u32 vector, u64 address)
{
    idt[vector] = (struct gate){ .offset_low = address,
                                 .selector = 8,
                                 .type = 0x8e,
                                 .offset_middle = address >> 16,
                                 .offset_high = address >> 32 };
}

void interrupts_init(void)
{
    for (u32 i = 0; i < 16; i++)
        set_gate(32 + i, (u64)interrupt_entries + 16 * i);
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    mmio_write(LOCAL_APIC + 0xf0, 0x1ff); /* on; spurious interrupts have vector 255 */
}

extern const u8 protection_fault[];
extern volatile u32 faulted;

void catch_faults(void)
{
    set_gate(13, (u64)protection_fault);
}

int read_msr(u32 msr, u64 *value)
{
    u32 low, high;
    faulted = 0;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
    *value = (u64)high << 32 | low;
    return !faulted;
}

void route(u32 pin, u32 line, int level)
{
    u32 processor = mmio_read(LOCAL_APIC + 0x20) >> 24;
    mmio_write(IO_APIC, 0x11 + 2 * pin);
    mmio_write(IO_APIC + 0x10, processor << 24);
    mmio_write(IO_APIC, 0x10 + 2 * pin);
    mmio_write(IO_APIC + 0x10, (32 + line) | (level ? 1 << 15 : 0));
}

void on_interrupt(u32 line, void (*handler)(void))
{
    handlers[line] = handler;
}

u32 interrupt_count(u32 line)
{
    return counts[line];
}

void interrupt(u64 vector)
{
    u32 line = vector - 32;
    counts[line]++;
    if (handlers[line])
        handlers[line]();
    mmio_write(LOCAL_APIC + 0xb0, 0);
}
