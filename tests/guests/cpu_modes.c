/* SPDX-License-Identifier: Apache-2.0 */
/* Modes about processors: exits, interrupts, several of them, and what CPUID says. */

#include "guest.h"

/* count=N writes to a port that nobody has. */
void mode_port_out(void)
{
    u64 count = option("count", 100000);
    u32 begin = pm_timer();
    for (u64 i = 0; i < count; i++)
        out8(0x80, i);
    u64 ticks = pm_timer() - begin;
    print("port-out: %lu in %lu us\n", count, ticks * 1000000 / PM_TIMER_HZ);
}

/* Sleeps through count=N interrupts of the PIT at 100 Hz. */
void mode_ticks(void)
{
    u32 count = option("count", 10);
    u16 divisor = 11932;
    interrupts_init();
    route(2, 0, 0);
    out8(0x43, 0x34);
    out8(0x40, divisor & 0xff);
    out8(0x40, divisor >> 8);
    while (interrupt_count(0) < count)
        wait_for_interrupt();
    print("ticks: %u\n", interrupt_count(0));
}

extern const u8 trampoline[], trampoline_end[];
extern volatile u32 ap_count;
static volatile u64 seen;

void ap_main(u32 number)
{
    (void)number;
    u64 id = mmio_read(0xfee00020) >> 24;
    asm volatile("lock orq %1, %0" : "+m"(seen) : "r"(1ul << id));
    if (has_word("busy"))
        for (;;)
            out8(0x80, id);
}

static void broadcast(u32 command)
{
    mmio_write(0xfee00300, command | 3 << 18); /* all but this one */
    while (mmio_read(0xfee00300) & 1 << 12)
        pause();
}

/* Starts the others by INIT and SIPI, and says who came: cpus=N in all. With `busy` they then never rest. */
void mode_smp(void)
{
    u32 cpus = option("cpus", 2);
    u64 wanted = (1ul << cpus) - 1;
    for (u32 i = 0; trampoline + i < trampoline_end; i++)
        ((volatile u8 *)0x8000)[i] = trampoline[i];
    mmio_write(0xfee000f0, 0x1ff);
    seen = 1ul << (mmio_read(0xfee00020) >> 24);
    broadcast(0x4500);
    delay_us(10000);
    broadcast(0x4608);
    delay_us(200);
    broadcast(0x4608);
    for (u32 i = 0; i < 1000 && seen != wanted; i++)
        delay_us(10000);
    print("smp: processors %lx of %lx\n", seen, wanted);
    if (has_word("busy")) {
        print("busy\n");
        for (;;)
            out8(0x80, 0);
    }
}

static void cpuid(u32 leaf, u32 subleaf)
{
    u32 a = leaf, b, c = subleaf, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    print("cpuid %x.%x: %x %x %x %x\n", leaf, subleaf, a, b, c, d);
}

/* Every leaf that the guest can see. */
void mode_cpuid(void)
{
    static const u32 bases[] = { 0, 0x40000000, 0x80000000 };
    for (u32 i = 0; i < 3; i++) {
        u32 last = bases[i], b, c, d;
        asm volatile("cpuid" : "+a"(last), "=b"(b), "=c"(c), "=d"(d));
        for (u32 leaf = bases[i]; leaf <= last && leaf < bases[i] + 0x30; leaf++) {
            u32 subleaves = leaf == 4 || leaf == 7 || leaf == 0xb || leaf == 0x8000001d ? 4 : leaf == 0xd ? 10 : 1;
            for (u32 subleaf = 0; subleaf < subleaves; subleaf++)
                cpuid(leaf, subleaf);
        }
    }
}
