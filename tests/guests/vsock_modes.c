/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use virtio-vsock.
 *
 * vsock: tells its CID; takes connections to port 1000 and answers what comes with "heard " before it; and, if an option
 *   `to` names a port of the host's, connects there from port 2000, says "hello from the guest" and answers likewise. Tells of
 *   each end, and of the event that a restored machine's driver gets. Never ends.
 * vsock-hostile: breaks the rules, one after the other, and tells what became of each. */

#include "queues.h"

enum { VSOCK_FUNCTION = 10 << 3, TO_GUEST = 0, FROM_GUEST = 1, EVENTS = 2, QUEUE_COUNT = 3 };
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };
enum { HOST = 2, PORT = 1000, OWN_PORT = 2000, ROOM = 1 << 16 };

struct packet {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, room, taken;
    u8 data[1024];
} __attribute__((packed));
enum { HEADER = 44 };

static volatile struct packet heard, said;
static volatile u32 event;
static u64 cid;

static void listen(void)
{
    queue_describe(TO_GUEST, 0, &heard, sizeof heard, DESCRIPTOR_WRITE, 0);
    queue_give(TO_GUEST, 0);
}

static void await_event(void)
{
    queue_describe(EVENTS, 0, &event, sizeof event, DESCRIPTOR_WRITE, 0);
    queue_give(EVENTS, 0);
}

static int has_come(u16 queue) { return queues[queue].used.index == queues[queue].available.index; }

static void fill(u16 op, u32 own, u32 port, u32 len)
{
    said.src_cid = cid;
    said.dst_cid = HOST;
    said.src_port = own;
    said.dst_port = port;
    said.len = len;
    said.type = 1;
    said.op = op;
    said.flags = op == SHUTDOWN ? 3 : 0;
    said.room = ROOM;
    /* The room is for all of a connection's bytes: none is ever said to be taken. */
    said.taken = 0;
}

static int say(u16 op, u32 own, u32 port, u32 len)
{
    fill(op, own, port, len);
    queue_describe(FROM_GUEST, 0, &said, HEADER + len, 0, 0);
    queue_give(FROM_GUEST, 0);
    return queue_wait(FROM_GUEST);
}

static u32 put_words(u32 at, const char *text)
{
    for (; *text; text++)
        said.data[at++] = *text;
    return at;
}

static void answer(void)
{
    u32 own = heard.dst_port, port = heard.src_port, at;
    switch (heard.op) {
    case REQUEST:
        say(own == PORT ? RESPONSE : RST, own, port, 0);
        break;
    case RESPONSE:
        print("vsock: connected from %u\n", own);
        say(RW, own, port, put_words(0, "hello from the guest\n"));
        break;
    case RW:
        at = put_words(0, "heard ");
        for (u32 i = 0; i < heard.len && at < sizeof said.data; i++)
            said.data[at++] = heard.data[i];
        say(RW, own, port, at);
        break;
    case CREDIT_REQUEST:
        say(CREDIT_UPDATE, own, port, 0);
        break;
    case SHUTDOWN:
        print("vsock: %u ends with %u\n", own, heard.flags);
        say(SHUTDOWN, own, port, 0);
        break;
    case RST:
        print("vsock: %u is reset\n", own);
        break;
    }
}

static int start(void)
{
    if (!queues_start(VSOCK_FUNCTION, 0x1053, QUEUE_COUNT))
        return 0;
    cid = mmio_read(virtio.device);
    return 1;
}

void mode_vsock(void)
{
    if (!start()) {
        print("vsock: none\n");
        return;
    }
    u32 to = option("to", 0);
    await_event();
    listen();
    print("vsock: cid %u\n", (u32)cid);
    if (to)
        say(REQUEST, OWN_PORT, to, 0);
    for (;;) {
        if (has_come(TO_GUEST)) {
            answer();
            listen();
        }
        if (has_come(EVENTS)) {
            print("vsock: event %u, cid %u\n", event, mmio_read(virtio.device));
            await_event();
        }
    }
}

static void report(const char *what, int used)
{
    print("vsock-hostile: %s: %s\n", what, virtio_status() & NEEDS_RESET ? "reset" : used ? "answered" : "nothing");
}

/* The rings' rules. */
static void try(const char *what, u16 queue, u32 len, u16 flags, const volatile void *address)
{
    start();
    fill(CREDIT_UPDATE, 1, 2, 0);
    /* An answer waits for room. */
    if (queue == TO_GUEST)
        say(CREDIT_UPDATE, 1, 2, 0);
    queue_describe(queue, 0, address, len, flags, 0);
    queue_give(queue, 0);
    report(what, queue_wait(queue));
}

/* The packets': what answers one that belongs to no connection. */
static void ask(const char *what, u64 src, u64 dst, u16 type, u16 op)
{
    start();
    listen();
    fill(op, 1, 2, 0);
    said.src_cid = src;
    said.dst_cid = dst;
    said.type = type;
    queue_describe(FROM_GUEST, 0, &said, HEADER, 0, 0);
    queue_give(FROM_GUEST, 0);
    queue_wait(FROM_GUEST);
    /* Another packet, which is answered in any case: what comes first is the answer to this one or that. */
    fill(RW, 7, 8, 0);
    queue_give(FROM_GUEST, 0);
    queue_wait(FROM_GUEST);
    queue_wait(TO_GUEST);
    print("vsock-hostile: %s: %s\n", what,
        heard.op != RST ? "something else" : heard.dst_port == 1 ? "refused" : "not answered");
}

void mode_vsock_hostile(void)
{
    try("half a header", FROM_GUEST, HEADER - 1, 0, &said);
    try("a packet to be written", FROM_GUEST, HEADER, DESCRIPTOR_WRITE, &said);
    try("a packet from nowhere", FROM_GUEST, HEADER, 0, (void *)0x7f0000000000);
    try("a loop", FROM_GUEST, HEADER, DESCRIPTOR_NEXT, &said);
    try("no room for a header", TO_GUEST, HEADER - 1, DESCRIPTOR_WRITE, &heard);
    try("room to be read", TO_GUEST, sizeof heard, 0, &heard);
    start();
    fill(RW, 1, 2, 100);
    queue_describe(FROM_GUEST, 0, &said, HEADER + 99, 0, 0);
    queue_give(FROM_GUEST, 0);
    report("fewer bytes than it says", queue_wait(FROM_GUEST));
    ask("a request where nobody listens", cid, HOST, 1, REQUEST);
    ask("bytes of no connection", cid, HOST, 1, RW);
    ask("an unknown operation", cid, HOST, 1, 99);
    ask("an unknown type", cid, HOST, 9, REQUEST);
    ask("another host", cid, 1, 1, REQUEST);
    ask("a reset of nothing", cid, HOST, 1, RST);
    ask("somebody else's", HOST, HOST, 1, REQUEST);
    ask("and then it works", cid, HOST, 1, RW);
    halt();
}
