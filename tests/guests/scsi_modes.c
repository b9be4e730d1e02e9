/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use the SCSI host adapter.
 *
 * scsi: tells what its targets are, writes to the disks' first block, and tells what becomes of the media in the drives;
 *   with the word "lock" it locks a drive whose medium is there, until it is asked for the medium. Never ends.
 * scsi-hostile: breaks the rules, one after the other, and tells what became of each. */

#include "queues.h"

enum { SCSI_FUNCTION = 7 << 3, CONTROL = 0, EVENTS = 1, COMMANDS = 2, QUEUE_COUNT = 3, TARGETS = 4 };
enum { OVERRUN = 1, BAD_TARGET = 3 };

static volatile struct {
    u8 lun[8], tag[8], attribute, priority, number, cdb[32];
} __attribute__((packed)) command;

static volatile struct {
    u32 sense_len, left;
    u16 qualifier;
    u8 status, response, sense[96];
} __attribute__((packed)) answer;

static volatile u8 data[2048];

/* What came of a command: the transport's response in the third byte, key and code of the sense below it. */
static u32 ask(u8 target, const u8 *cdb, u32 len, u32 out, u32 in)
{
    for (u32 i = 0; i < 32; i++)
        command.cdb[i] = i < len ? cdb[i] : 0;
    command.lun[0] = 1;
    command.lun[1] = target;
    command.lun[2] = 0x40;
    queue_describe(COMMANDS, 0, &command, sizeof command, DESCRIPTOR_NEXT, out ? 1 : 2);
    queue_describe(COMMANDS, 1, data, out, DESCRIPTOR_NEXT, 2);
    queue_describe(COMMANDS, 2, &answer, sizeof answer, DESCRIPTOR_WRITE | (in ? DESCRIPTOR_NEXT : 0), 3);
    queue_describe(COMMANDS, 3, data, in, DESCRIPTOR_WRITE, 0);
    queue_give(COMMANDS, 0);
    if (!queue_wait(COMMANDS))
        return 0xff0000;
    if (answer.response)
        return answer.response << 16;
    return answer.status ? answer.sense[2] << 8 | answer.sense[12] : 0;
}

static u32 simple(u8 target, u8 opcode, u8 fourth, u32 in)
{
    u8 cdb[6] = { opcode, 0, 0, 0, fourth, 0 };
    return ask(target, cdb, sizeof cdb, 0, in);
}

static u32 word(u32 at) { return data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]; }

static int is_drive(u8 target)
{
    simple(target, 0x12, 36, 36);
    return data[0] == 5;
}

static void describe_disk(u8 target)
{
    u8 capacity[10] = { 0x25 }, write[10] = { 0x2a, [8] = 1 };
    ask(target, capacity, sizeof capacity, 0, 8);
    u32 blocks = word(0) + 1;
    const char *mark = "vmbus";
    for (u32 i = 0; i < 512; i++)
        data[i] = i < 5 ? mark[i] : 0;
    print("scsi: target %u is a disk of %u blocks, written: %x\n", target, blocks, ask(target, write, 10, 512, 0));
}

static u32 known[TARGETS];

static void look_at_drive(u8 target)
{
    u8 read[10] = { 0x28, [5] = 16, [8] = 1 }, events[10] = { 0x4a, 1, 0, 0, 0x10, [8] = 8 };
    u32 state = simple(target, 0x00, 0, 0);
    if (state == 0x628)
        state = simple(target, 0x00, 0, 0);
    if (ask(target, events, sizeof events, 0, 8) == 0 && data[4] == 1) {
        print("scsi: target %u: the medium is asked for\n", target);
        simple(target, 0x1e, 0, 0);
    }
    u32 first = 0;
    if (state == 0 && ask(target, read, sizeof read, 0, 2048) == 0)
        first = word(0);
    u32 now = state ? state : first | 1;
    if (now == known[target])
        return;
    known[target] = now;
    if (state)
        print("scsi: target %u has no medium, %x\n", target, state);
    else
        print("scsi: target %u has a medium, %x\n", target, first);
    if (state == 0 && has_word("lock"))
        simple(target, 0x1e, 1, 0);
}

void mode_scsi(void)
{
    if (!queues_start(SCSI_FUNCTION, 0x1048, QUEUE_COUNT)) {
        print("scsi: none\n");
        return;
    }
    u8 drives[TARGETS], targets = 0;
    for (; targets < TARGETS && simple(targets, 0x12, 36, 36) != BAD_TARGET << 16; targets++) {
        drives[targets] = is_drive(targets);
        if (!drives[targets])
            describe_disk(targets);
    }
    print("scsi: %u targets\n", targets);
    for (;;)
        for (u8 target = 0; target < targets; target++)
            if (drives[target])
                look_at_drive(target);
}

static void try(const char *what, u16 queue, u32 first, u16 first_flags, u32 second, u16 second_flags)
{
    queues_start(SCSI_FUNCTION, 0x1048, QUEUE_COUNT);
    queue_describe(queue, 0, &command, first, first_flags, 1);
    queue_describe(queue, 1, &answer, second, second_flags, 1);
    queue_give(queue, 0);
    int used = queue_wait(queue);
    print("scsi-hostile: %s: %s\n", what, virtio_status() & NEEDS_RESET ? "reset" : used ? "answered" : "nothing");
}

void mode_scsi_hostile(void)
{
    enum { NEXT = DESCRIPTOR_NEXT, WRITE = DESCRIPTOR_WRITE };
    try("no whole command", COMMANDS, sizeof command - 1, NEXT, sizeof answer, WRITE);
    try("no room for the answer", COMMANDS, sizeof command, NEXT, sizeof answer - 1, WRITE);
    try("nothing to write to", COMMANDS, sizeof command, NEXT, sizeof answer, 0);
    try("a loop", COMMANDS, sizeof command, NEXT, sizeof answer, WRITE | NEXT);
    try("no whole function", CONTROL, 3, NEXT, 1, WRITE);
    try("no room for its answer", CONTROL, 24, 0, 0, 0);
    queues_start(SCSI_FUNCTION, 0x1048, QUEUE_COUNT);
    queue_describe(COMMANDS, 0, &command, sizeof command, NEXT, 1);
    queue_describe(COMMANDS, 1, (void *)0x7f0000000000, sizeof answer, WRITE, 0);
    queue_give(COMMANDS, 0);
    queue_wait(COMMANDS);
    print("scsi-hostile: an answer to nowhere: %s\n", virtio_status() & NEEDS_RESET ? "reset" : "nothing");
    queues_start(SCSI_FUNCTION, 0x1048, QUEUE_COUNT);
    u8 far[16] = { 0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1 }, many[10] = { 0x28, [8] = 8 };
    print("scsi-hostile: behind the end: %x\n", ask(0, far, 16, 0, 512));
    print("scsi-hostile: more than there is room for: %x\n", ask(0, many, 10, 0, 512));
    print("scsi-hostile: no such target: %x\n", simple(77, 0, 0, 0));
    print("scsi-hostile: and then it works: %x\n", simple(0, 0, 0, 0));
    halt();
}
