/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use the named ports.
 *
 * ports: tells the names of ports 0 and 1, opens them, and answers what comes by one of them with "heard " before it.
 *   Never ends.
 * ports-hostile: breaks the rules, one after the other, and tells what became of each. */

#include "queues.h"

enum { PORTS_FUNCTION = 8 << 3, TO_GUEST = 2, FROM_GUEST = 3, PORTS = 2, QUEUE_COUNT = 6 };
enum { DEVICE_READY = 0, PORT_ADD = 1, PORT_READY = 3, PORT_OPEN = 6, PORT_NAME = 7 };

static volatile struct {
    u32 port;
    u16 event, value;
    char text[120];
} heard, said;

static volatile char words[PORTS][256], answer[300];

static u16 receives(u32 port) { return port ? 2 * port + 2 : 0; }

static void say(u32 port, u16 event)
{
    said.port = port;
    said.event = event;
    said.value = 1;
    queue_describe(FROM_GUEST, 0, &said, 8, 0, 0);
    queue_give(FROM_GUEST, 0);
    queue_wait(FROM_GUEST);
}

static void listen(void)
{
    queue_describe(TO_GUEST, 0, &heard, sizeof heard, DESCRIPTOR_WRITE, 0);
    queue_give(TO_GUEST, 0);
}

static void make_room(u32 port)
{
    queue_describe(receives(port), 0, words[port], sizeof words[port], DESCRIPTOR_WRITE, 0);
    queue_give(receives(port), 0);
}

static int has_come(u16 queue) { return queues[queue].used.index == queues[queue].available.index; }

static void told(void)
{
    u32 port = heard.port;
    if (heard.event == PORT_ADD)
        say(port, PORT_READY);
    if (heard.event == PORT_NAME) {
        print("ports: %u is ", port);
        for (u32 i = 0; heard.text[i]; i++)
            put(heard.text[i]);
        print("\n");
        say(port, PORT_OPEN);
        make_room(port);
    }
    listen();
}

static void answer_words(u32 port)
{
    u16 queue = receives(port);
    u32 len = queues[queue].used.ring[(queues[queue].used.index - 1) % SIZE].len, at = 0;
    for (const char *text = "heard "; *text; text++)
        answer[at++] = *text;
    for (u32 i = 0; i < len; i++)
        answer[at++] = words[port][i];
    queue_describe(queue + 1, 0, answer, at, 0, 0);
    queue_give(queue + 1, 0);
    queue_wait(queue + 1);
    make_room(port);
}

void mode_ports(void)
{
    if (!queues_start(PORTS_FUNCTION, 0x1043, QUEUE_COUNT)) {
        print("ports: none\n");
        return;
    }
    listen();
    say(0, DEVICE_READY);
    for (;;) {
        if (has_come(TO_GUEST))
            told();
        for (u32 port = 0; port < PORTS; port++)
            if (queues[receives(port)].available.index && has_come(receives(port)))
                answer_words(port);
    }
}

static void try(const char *what, u16 queue, const volatile void *address, u32 len, u16 flags)
{
    queues_start(PORTS_FUNCTION, 0x1043, QUEUE_COUNT);
    if (queue == TO_GUEST)
        say(0, DEVICE_READY);
    queue_describe(queue, 0, address, len, flags, 0);
    queue_give(queue, 0);
    int used = queue_wait(queue);
    print("ports-hostile: %s: %s\n", what, virtio_status() & NEEDS_RESET ? "reset" : used ? "answered" : "nothing");
}

void mode_ports_hostile(void)
{
    try("half a message", FROM_GUEST, &said, 7, 0);
    try("a message to be written", FROM_GUEST, &said, 8, DESCRIPTOR_WRITE);
    try("room for half a message", TO_GUEST, &heard, 4, DESCRIPTOR_WRITE);
    try("words to be written", 1, answer, 8, DESCRIPTOR_WRITE);
    try("words from nowhere", 1, (void *)0x7f0000000000, 8, 0);
    try("a loop", 1, answer, 8, DESCRIPTOR_NEXT);
    said.port = 0xffffffff;
    try("a port that is not there", FROM_GUEST, &said, 8, 0);
    try("and then it works", 1, "fine", 4, 0);
    halt();
}
