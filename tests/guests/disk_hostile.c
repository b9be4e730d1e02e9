/* SPDX-License-Identifier: Apache-2.0 */
/* disk-hostile: breaks the rules of virtio one by one. After each, the device must ask for a reset or carry on,
 * and work again once it is reset: a line says which. */

#include "virtio.h"

/* Beyond all RAM of the machine, and not the 32-bit MMIO window. */
static void *const NOWHERE = (void *)0x7000000000;

static void whole_request(u16 first)
{
    request.type = BLOCK_IN;
    request.sector = 0;
    describe(first, &request, sizeof request, DESCRIPTOR_NEXT, first + 1);
    describe(first + 1, sector_data, 512, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, first + 2);
    describe(first + 2, &request_status, 1, DESCRIPTOR_WRITE, 0);
}

static void head_out_of_range(void) { offer(SIZE); }
static void head_far_out_of_range(void) { offer(0xffff); }

static void next_out_of_range(void)
{
    whole_request(0);
    rings.descriptors[1].next = 0x7fff;
    offer(0);
}

static void circle(void)
{
    whole_request(0);
    describe(2, &request_status, 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1);
    offer(0);
}

static void circle_of_nothing(void)
{
    describe(0, &request, 0, DESCRIPTOR_NEXT, 0);
    offer(0);
}

static void huge_length(void)
{
    whole_request(0);
    rings.descriptors[1].len = 0xffffffff;
    offer(0);
}

static void address_nowhere(void)
{
    whole_request(0);
    rings.descriptors[1].address = (u64)NOWHERE;
    offer(0);
}

static void address_wraps(void)
{
    whole_request(0);
    rings.descriptors[1].address = -256ul;
    offer(0);
}

static void header_nowhere(void)
{
    whole_request(0);
    rings.descriptors[0].address = (u64)NOWHERE;
    offer(0);
}

static void status_nowhere(void)
{
    whole_request(0);
    rings.descriptors[2].address = (u64)NOWHERE;
    offer(0);
}

static void data_in_registers(void)
{
    whole_request(0);
    rings.descriptors[1].address = virtio.bar;
    offer(0);
}

static void readable_after_writable(void)
{
    whole_request(0);
    rings.descriptors[2].flags = 0;
    offer(0);
}

static void no_status(void)
{
    describe(0, &request, sizeof request, 0, 0);
    offer(0);
}

static void short_header(void)
{
    describe(0, &request, 8, DESCRIPTOR_NEXT, 1);
    describe(1, &request_status, 1, DESCRIPTOR_WRITE, 0);
    offer(0);
}

static void indirect_in_indirect(void)
{
    static volatile struct descriptor table[2];
    table[0].address = (u64)table;
    table[0].len = sizeof table;
    table[0].flags = DESCRIPTOR_INDIRECT;
    describe(0, table, sizeof table, DESCRIPTOR_INDIRECT, 0);
    offer(0);
}

static void indirect_of_odd_length(void)
{
    describe(0, sector_data, 17, DESCRIPTOR_INDIRECT, 0);
    offer(0);
}

static void indirect_nowhere(void)
{
    describe(0, NOWHERE, 64, DESCRIPTOR_INDIRECT, 0);
    offer(0);
}

static void index_jumps(void)
{
    whole_request(0);
    rings.available.index = 0x4000;
}

static void same_head_many_times(void)
{
    whole_request(0);
    for (u32 i = 0; i < SIZE; i++)
        offer(0);
}

static void sector_beyond_the_end(void)
{
    whole_request(0);
    request.sector = -1ul;
    offer(0);
}

static void unknown_type(void)
{
    whole_request(0);
    request.type = 0xdeadbeef;
    offer(0);
}

static void half_a_sector(void)
{
    whole_request(0);
    rings.descriptors[1].len = 100;
    offer(0);
}

/* What follows is no request: the bell of queues that are not there, registers written out of turn. */
static void bells(void)
{
    for (u16 queue = 1; queue < 64; queue++)
        virtio_kick(queue);
}

static void registers_while_running(void)
{
    virtio_write(QUEUE_SELECT, 2, 0);
    virtio_write(QUEUE_DESCRIPTORS, 8, (u64)NOWHERE);
    virtio_write(QUEUE_SIZE, 2, 0);
    virtio_write(QUEUE_ENABLE, 2, 0);
    virtio_write(ACCEPT_SELECT, 4, 0);
    virtio_write(ACCEPT, 4, 0xffffffff);
    virtio_write(QUEUE_SELECT, 2, 0xffff);
    virtio_write(QUEUE_VECTOR, 2, 0x1234);
    virtio_write(QUEUE_ENABLE, 2, 1);
}

static void bar_moves_away_and_back(void)
{
    u32 low = pci_read(virtio.function, 0x10, 4);
    pci_write(virtio.function, 0x10, 4, 0xfee00000);
    pci_write(virtio.function, 0x10, 4, 0x00100000);
    pci_write(virtio.function, 0x10, 4, 0xffffffff);
    pci_write(virtio.function, 0x10, 4, low);
}

static const struct {
    const char *name;
    void (*run)(void);
} attempts[] = {
    { "head out of range", head_out_of_range },
    { "head far out of range", head_far_out_of_range },
    { "next out of range", next_out_of_range },
    { "circle", circle },
    { "circle of nothing", circle_of_nothing },
    { "huge length", huge_length },
    { "address nowhere", address_nowhere },
    { "address wraps", address_wraps },
    { "header nowhere", header_nowhere },
    { "status nowhere", status_nowhere },
    { "data in registers", data_in_registers },
    { "readable after writable", readable_after_writable },
    { "no status", no_status },
    { "short header", short_header },
    { "indirect in indirect", indirect_in_indirect },
    { "indirect of odd length", indirect_of_odd_length },
    { "indirect nowhere", indirect_nowhere },
    { "index jumps", index_jumps },
    { "same head many times", same_head_many_times },
    { "sector beyond the end", sector_beyond_the_end },
    { "unknown type", unknown_type },
    { "half a sector", half_a_sector },
    { "bells", bells },
    { "registers while running", registers_while_running },
    { "bar moves away and back", bar_moves_away_and_back },
};

static int works(void)
{
    return virtio_start(0, 0) && block_request(BLOCK_IN, 0, 512) == 0;
}

static void report(const char *name, const char *outcome)
{
    print("hostile: %s: %s, %s\n", name, outcome, works() ? "works after a reset" : "DOES NOT WORK AFTER A RESET");
}

/* Whether the device comes to say that it needs a reset, within 100 ms. */
static const char *outcome(void)
{
    for (u32 i = 0; i < 100; i++) {
        if (virtio_status() & NEEDS_RESET)
            return "needs reset";
        delay_us(1000);
    }
    return "carries on";
}

void mode_disk_hostile(void)
{
    if (!virtio_find(disk_function(option("disk", 0))) || !works()) {
        print("hostile: no disk\n");
        return;
    }
    for (u32 i = 0; i < sizeof attempts / sizeof *attempts; i++) {
        virtio_start(0, 0);
        attempts[i].run();
        virtio_kick(0);
        report(attempts[i].name, outcome());
    }
    virtio_start(0, (u64)NOWHERE);
    report("used ring nowhere", outcome());
    virtio_start(0, virtio.bar);
    report("used ring in registers", outcome());
    virtio_start(0, (u64)&rings.used + 2);
    report("used ring unaligned", outcome());
    print("hostile: without VERSION_1: %s\n", virtio_start(1ul << 32, 0) ? "STARTED" : "turned down");
    print("hostile: %s\n", works() ? "alive" : "DEAD");
}
