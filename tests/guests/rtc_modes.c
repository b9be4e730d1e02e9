/* SPDX-License-Identifier: Apache-2.0 */
/* The real-time clock's interrupts.
 *
 * rtc: tells of one interrupt for each cause: an update, an alarm two seconds from now, and ten at 64 a second.
 * rtc-seconds: tells of each update. Never ends. */

#include "guest.h"

enum { SECONDS = 0, SECONDS_ALARM = 1, MINUTES_ALARM = 3, HOURS_ALARM = 5, A = 10, B = 11, C = 12 };
enum { PERIODIC = 0x40, ALARM = 0x20, UPDATE = 0x10, HOURS_24 = 2, ANY = 0xff, RTC_LINE = 8 };

static volatile u32 causes;

static void on_clock(void)
{
    causes |= cmos_read(C);
}

static void enable(u8 what)
{
    cmos_read(C);
    causes = 0;
    cmos_write(B, what | HOURS_24);
}

static u32 await(u8 what, u32 count)
{
    u32 before = interrupt_count(RTC_LINE);
    enable(what);
    while (interrupt_count(RTC_LINE) - before < count)
        wait_for_interrupt();
    enable(0);
    return interrupt_count(RTC_LINE) - before;
}

static void set_alarm(u32 in)
{
    u32 bcd = cmos_read(SECONDS), second = ((bcd >> 4) * 10 + (bcd & 15) + in) % 60;
    cmos_write(SECONDS_ALARM, second / 10 << 4 | second % 10);
    cmos_write(MINUTES_ALARM, ANY);
    cmos_write(HOURS_ALARM, ANY);
}

static void start(void)
{
    interrupts_init();
    on_interrupt(RTC_LINE, on_clock);
    route(8, RTC_LINE, 0);
    enable(0);
}

void mode_rtc(void)
{
    start();
    print("rtc: update %u\n", await(UPDATE, 1));
    set_alarm(2);
    print("rtc: alarm %u\n", await(ALARM, 1));
    cmos_write(A, 0x2a);
    print("rtc: periodic %u\n", await(PERIODIC, 10));
    halt();
}

void mode_rtc_seconds(void)
{
    start();
    enable(UPDATE);
    for (u32 told = 0;;) {
        wait_for_interrupt();
        if (interrupt_count(RTC_LINE) != told) {
            told = interrupt_count(RTC_LINE);
            print("rtc-seconds: %u, %x\n", told, causes);
        }
    }
}
