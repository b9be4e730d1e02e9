/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use the balloon.
 *
 * balloon touch=MIB: writes to that much memory from 16 MiB on, then gives the device what it asks for, from the end
 *   of what was touched downwards, and takes it back by touching it; answers for figures. Never ends.
 * balloon-hostile: gives what is not its own to give, and breaks the rules; prints what became of each; ends at a key.
 * report touch=MIB: writes to that much memory and reports all of it free, then waits. */

#include "queues.h"

enum { INFLATE = 0, DEFLATE = 1, STATISTICS = 2, REPORTING = 3, BATCH = 256, PAGE = 4096 };
enum { FIRST = 16 << 20, BALLOON_FUNCTION = 6 << 3 };

static volatile u32 list[BATCH] __attribute__((aligned(4096)));
static volatile u8 figures[40];

static int start(void)
{
    if (queues_start(BALLOON_FUNCTION, 0x1045, 4))
        return 1;
    print("balloon: none\n");
    return 0;
}

/* Makes one buffer available in descriptor 0 of a queue. */
static void give(u16 index, const volatile void *address, u32 len, u16 flags)
{
    queue_describe(index, 0, address, len, flags, 0);
    queue_give(index, 0);
}

/* The same, and waits for it; 0 if the device asks for a reset instead. */
static int ask(u16 index, const volatile void *address, u32 len, u16 flags)
{
    give(index, address, len, flags);
    while (queues[index].used.index != queues[index].available.index) {
        if (virtio_status() & NEEDS_RESET)
            return 0;
        pause();
    }
    return 1;
}

static u64 touch(void)
{
    u64 end = FIRST + (option("touch", 16) << 20);
    for (u64 page = FIRST; page < end; page += PAGE)
        *(volatile u64 *)page = page | 1;
    return end;
}

static void put_figure(u32 place, u16 tag, u64 value)
{
    volatile u8 *entry = figures + 10 * place;
    for (u32 i = 0; i < 2; i++)
        entry[i] = tag >> (8 * i);
    for (u32 i = 0; i < 8; i++)
        entry[2 + i] = value >> (8 * i);
}

static void send_figures(u64 free, u64 total)
{
    put_figure(0, 4, free);
    put_figure(1, 5, total);
    put_figure(2, 6, free);
    put_figure(3, 99, 1);
    give(STATISTICS, figures, sizeof figures, 0);
}

void mode_balloon(void)
{
    u64 end = touch();
    u32 most = (end - FIRST) / PAGE, have = 0;
    u16 answered = 0;
    if (!start())
        return;
    send_figures(most * (u64)PAGE, end);
    print("balloon: touched %u pages\n", most);
    for (;;) {
        u32 wanted = mmio_read(virtio.device);
        u32 step = 0;
        if (wanted > most)
            wanted = most;
        if (queues[STATISTICS].used.index != answered) {
            answered = queues[STATISTICS].used.index;
            send_figures((most - have) * (u64)PAGE, end);
        }
        if (wanted == have) {
            delay_us(200);
            continue;
        }
        if (wanted > have) {
            for (; step < BATCH && have + step < wanted; step++)
                list[step] = (end / PAGE) - 1 - have - step;
            ask(INFLATE, list, 4 * step, 0);
            have += step;
        } else {
            for (; step < BATCH && have - step > wanted; step++) {
                u64 page = end / PAGE - have + step;
                u64 found = *(volatile u64 *)(page * PAGE);
                if (found)
                    print("balloon: page %lu holds %lx\n", page, found);
                *(volatile u64 *)(page * PAGE) = 1;
                list[step] = page;
            }
            ask(DEFLATE, list, 4 * step, 0);
            have -= step;
        }
        mmio_write(virtio.device + 4, have);
        if (have == wanted)
            print("balloon: %u pages\n", have);
    }
}

void mode_report(void)
{
    u64 end = touch();
    if (!start())
        return;
    print("report: touched\n");
    while (get() < 0)
        pause();
    for (u64 page = FIRST; page < end; page += 1 << 20)
        ask(REPORTING, (volatile void *)page, 1 << 20, DESCRIPTOR_WRITE);
    u32 left = 0;
    for (u64 page = FIRST; page < end; page += 1 << 20)
        left += *(volatile u64 *)page != 0;
    print("report: %u of %lu first pages left\n", left, (end - FIRST) >> 20);
    for (;;)
        pause();
}

static void outcome(const char *what, int ok)
{
    print("hostile: %s: %s\n", what, ok ? "taken" : "needs a reset");
    if (!ok)
        start();
}

void mode_balloon_hostile(void)
{
    static const u32 nowhere[] = { 0xffffffff, 0xb0000, 0x80000000, 0xfffff };
    if (!start())
        return;
    u64 end = touch();
    for (u32 i = 0; i < BATCH; i++)
        list[i] = nowhere[i % 4];
    outcome("pages that are not RAM", ask(INFLATE, list, sizeof list, 0));
    for (u32 i = 0; i < BATCH; i++)
        list[i] = FIRST / PAGE;
    outcome("one page, over and over", ask(INFLATE, list, sizeof list, 0));
    outcome("pages that were never given", ask(DEFLATE, list, sizeof list, 0));
    outcome("a list of an odd length", ask(INFLATE, list, 7, 0));
    outcome("nothing", ask(INFLATE, list, 0, 0));
    outcome("a list of 4 GiB", ask(INFLATE, (volatile void *)0, 0xffffffff, 0));
    outcome("a list that is not RAM", ask(INFLATE, (volatile void *)0xc0000000, 64, 0));
    outcome("a free page that is to be read", ask(REPORTING, (volatile void *)(end - PAGE), PAGE, 0));
    outcome("free memory beyond all there is", ask(REPORTING, (volatile void *)(end - PAGE), 0xffffffff, DESCRIPTOR_WRITE));
    /* The rings themselves: what is found there afterwards is zero, and zero is a ring without requests. */
    list[0] = (u64)&queues[REPORTING] / PAGE;
    outcome("its own rings", ask(INFLATE, list, 4, 0));
    mmio_write(virtio.device + 4, 0xffffffff);
    mmio_write(virtio.device, 0xffffffff);
    print("hostile: asked for %u, gave %x\n", mmio_read(virtio.device), mmio_read(virtio.device + 4));
    print("hostile: done\n");
    while (get() < 0)
        pause();
}
