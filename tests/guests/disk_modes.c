/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use a disk: disk=N says which, 0 if it is not given. */

#include "virtio.h"

/* FNV-1a, 64 bits, over the first `len` bytes of sector_data. */
static u64 checksum(u32 len)
{
    const volatile u8 *bytes = (const volatile u8 *)sector_data;
    u64 sum = 0xcbf29ce484222325;
    for (u32 i = 0; i < len; i++)
        sum = (sum ^ bytes[i]) * 0x100000001b3;
    return sum;
}

static int start(void)
{
    if (!virtio_find(disk_function(option("disk", 0)))) {
        print("disk: none\n");
        return 0;
    }
    if (!virtio_start(0, 0)) {
        print("disk: features refused\n");
        return 0;
    }
    return 1;
}

/* disk-read sector=N: the sector's checksum. */
void mode_disk_read(void)
{
    u64 sector = option("sector", 0);
    if (!start())
        return;
    print("disk: %lu sectors, %u queues\n", block_capacity(), mmio_read(virtio.common + QUEUES - 2) >> 16);
    u8 status = block_request(BLOCK_IN, sector, 512);
    print("sector %lu: status %u, checksum %lx\n", sector, status, checksum(512));
}

/* disk-id: the serial number. */
void mode_disk_id(void)
{
    if (!start())
        return;
    u8 status = block_request(BLOCK_GET_ID, 0, 20);
    ((volatile u8 *)sector_data)[20] = 0;
    print("id: status %u, %s\n", status, (const char *)sector_data);
}

/* Word w of sector s is seed + s * 64 + w. */
static void pattern(u64 sector, u64 seed)
{
    for (u32 word = 0; word < 64; word++)
        sector_data[word] = seed + sector * 64 + word;
}

/* disk-pattern sector=N count=N seed=N: writes and flushes, then reads back. */
void mode_disk_pattern(void)
{
    u64 first = option("sector", 0), count = option("count", 8), seed = option("seed", 1);
    if (!start())
        return;
    for (u64 sector = first; sector < first + count; sector++) {
        pattern(sector, seed);
        u8 status = block_request(BLOCK_OUT, sector, 512);
        if (status) {
            print("pattern: sector %lu: status %u\n", sector, status);
            return;
        }
    }
    print("pattern: flush status %u\n", block_request(BLOCK_FLUSH, 0, 0));
    for (u64 sector = first; sector < first + count; sector++) {
        if (block_request(BLOCK_IN, sector, 512) || sector_data[0] != seed + sector * 64
            || sector_data[63] != seed + sector * 64 + 63) {
            print("pattern: sector %lu reads back differently\n", sector);
            return;
        }
    }
    print("pattern: done, %lu sectors from %lu\n", count, first);
}

/* disk-span sector=N bytes=N times=N: one request over all of it, again and again; the sum of the sectors' first words. */
void mode_disk_span(void)
{
    volatile u64 *span = (volatile u64 *)0x800000;
    u64 bytes = option("bytes", 512), times = option("times", 1), sum = 0;
    if (!start())
        return;
    for (u64 time = 0; time < times; time++) {
        for (u64 word = 0; word < bytes / 8; word += 64)
            span[word] = 0;
        u8 status = block_request_at(BLOCK_IN, option("sector", 0), span, bytes);
        if (status) {
            print("span: status %u\n", status);
            return;
        }
        sum = 0;
        for (u64 word = 0; word < bytes / 8; word += 64)
            sum += span[word];
    }
    print("span: %lu bytes, sum %lx\n", bytes, sum);
}

/* disk-zero sector=N count=N: write zeroes, then a discard of the same. */
void mode_disk_zero(void)
{
    u64 first = option("sector", 0), count = option("count", 8);
    if (!start())
        return;
    sector_data[0] = first;
    sector_data[1] = count | 1ul << 32; /* unmap */
    print("zero: write zeroes status %u\n", block_request(BLOCK_WRITE_ZEROES, 0, 16));
    sector_data[1] = count;
    print("zero: discard status %u\n", block_request(BLOCK_DISCARD, 0, 16));
    u8 status = block_request(BLOCK_IN, first, 512);
    print("zero: read status %u, first word %lx\n", status, sector_data[0]);
}

/* disk-load bytes=N beat=MS: reads from the disk's first MiB without pause, one request at a time, and says now and then
 * how many there were. */
void mode_disk_load(void)
{
    u64 bytes = option("bytes", 4096), requests = 0;
    u32 interval = option("beat", 500) * 3580, beat = pm_timer();
    if (!start())
        return;
    for (;;) {
        u8 status = block_request(BLOCK_IN, requests * bytes % (1 << 20) / 512, bytes);
        if (status) {
            print("load: status %u\n", status);
            return;
        }
        if (++requests % 64 == 0 && pm_timer() - beat > interval) {
            beat = pm_timer();
            print("load: %lu\n", requests);
        }
    }
}

/* disk-loop sector=N count=N beat=MS: writes without pause, round and round; word 0 of a sector is the sequence
 * number. A line now and then (with the word sizes, another one), the last one after the power button and a flush. */
void mode_disk_loop(void)
{
    u64 first = option("sector", 0), count = option("count", 64), sequence = 0;
    u32 interval = option("beat", 500) * 3580, beat = pm_timer();
    if (!start())
        return;
    out16(PM1_STATUS, POWER_BUTTON);
    print("loop: begins\n");
    while (!(in16(PM1_STATUS) & POWER_BUTTON)) {
        pattern(first + sequence % count, sequence);
        sector_data[0] = sequence;
        u8 status = block_request(BLOCK_OUT, first + sequence % count, 512);
        if (status) {
            print("loop: sector %lu: status %u\n", first + sequence % count, status);
            return;
        }
        sequence++;
        if (pm_timer() - beat > interval) {
            beat = pm_timer();
            print("loop: beat %lu\n", sequence);
            if (has_word("sizes"))
                print("loop: %lu sectors\n", block_capacity());
        }
    }
    print("loop: flush status %u\n", block_request(BLOCK_FLUSH, 0, 0));
    print("loop: ended at %lu\n", sequence);
}

/* disk-interrupt: reads eight sectors, sleeping until the interrupt of each. */
void mode_disk_interrupt(void)
{
    interrupts_init();
    if (!start())
        return;
    virtio_use_msix(3);
    for (u16 i = 0; i < 8; i++) {
        request.type = BLOCK_IN;
        request.sector = i;
        describe(0, &request, sizeof request, DESCRIPTOR_NEXT, 1);
        describe(1, sector_data, 512, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 2);
        describe(2, &request_status, 1, DESCRIPTOR_WRITE, 0);
        offer(0);
        virtio_kick(0);
        while (interrupt_count(3) != i + 1u)
            wait_for_interrupt();
        if (rings.used.index != i + 1 || request_status)
            print("interrupt: request %u: used %u, status %u\n", i, rings.used.index, request_status);
    }
    print("interrupt: %u of 8\n", interrupt_count(3));
}

/* random: 32 bytes of the random number generator. */
void mode_random(void)
{
    if (!virtio_find(RNG_FUNCTION) || !virtio_start(0, 0)) {
        print("random: none\n");
        return;
    }
    describe(0, sector_data, 32, DESCRIPTOR_WRITE, 0);
    offer(0);
    virtio_kick(0);
    const char *outcome = wait_used(1) ? "used" : "no answer";
    print("random: %s, %u bytes, %lx %lx\n", outcome, rings.used.ring[0].len, sector_data[0], sector_data[1]);
}
