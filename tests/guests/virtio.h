/* SPDX-License-Identifier: Apache-2.0 */
/* A driver for virtio devices on PCI (virtio 1.2, modern, split rings, polled or by MSI-X), as little of one
 * as the modes need. One device at a time. */

#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"

/* pci.c: configuration space, by ECAM; a function is bus << 8 | device << 3 | function. */
enum { ECAM = 0xb0000000 };
u32 pci_read(u32 function, u32 offset, u32 bytes);
void pci_write(u32 function, u32 offset, u32 bytes, u32 value);
/* The same register through ports 0xcf8 and 0xcfc, 4 bytes. */
u32 pci_read_ports(u32 function, u32 offset);
/* Where the first capability with this ID lies from `after` on, else 0. */
u32 pci_capability(u32 function, u32 id, u32 after);
/* Function number of disk 0, 1, … and of the random number generator. */
u32 disk_function(u32 index);
enum { RNG_FUNCTION = 5 << 3 };

enum { SIZE = 16, DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4 };

struct descriptor {
    u64 address;
    u32 len;
    u16 flags, next;
};

struct rings {
    struct descriptor descriptors[SIZE];
    struct {
        u16 flags, index, ring[SIZE], used_event;
    } available;
    struct {
        u16 flags, index;
        struct { u32 id, len; } ring[SIZE];
        u16 available_event;
    } used __attribute__((aligned(4)));
} __attribute__((aligned(4096)));

extern volatile struct rings rings;

/* Registers of the common configuration (4.1.4.3). */
enum {
    OFFER_SELECT = 0, OFFER = 4, ACCEPT_SELECT = 8, ACCEPT = 12, CONFIG_VECTOR = 16, QUEUES = 18, STATUS = 20,
    QUEUE_SELECT = 22, QUEUE_SIZE = 24, QUEUE_VECTOR = 26, QUEUE_ENABLE = 28, QUEUE_DESCRIPTORS = 32,
    QUEUE_AVAILABLE = 40, QUEUE_USED = 48,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 0x40 };

struct virtio {
    u32 function;
    u64 bar, common, notify, isr, device;
    u64 features;
    u32 device_len; /* bytes of the device configuration */
};

extern struct virtio virtio;

/* Finds the structures, switches memory and bus mastering on; 0 if it is no virtio device. */
int virtio_find(u32 function);
/* Resets, accepts all features but those in `without`, sets queue 0 up (with the rings here, unless `used` is
 * given) and says DRIVER_OK; 0 if the device did not take the features. */
int virtio_start(u64 without, u64 used);
void virtio_reset(void);
u8 virtio_status(void);
void virtio_write(u32 common_register, u32 bytes, u64 value);
/* Vector 32 + line for queue 0. */
void virtio_use_msix(u32 line);

/* Puts descriptor `head` into the available ring; virtio_kick tells the device. */
void offer(u16 head);
void virtio_kick(u16 queue);
/* Waits until the device has used `count` requests since virtio_start; 0 if it asks for a reset, or after 10 s. */
int wait_used(u16 count);
void describe(u16 index, const volatile void *address, u32 len, u16 flags, u16 next);

/* block.c: one request at a time; the status byte, or 0xff if the device did not answer. */
enum { BLOCK_IN = 0, BLOCK_OUT = 1, BLOCK_FLUSH = 4, BLOCK_GET_ID = 8, BLOCK_DISCARD = 11, BLOCK_WRITE_ZEROES = 13 };
struct request {
    u32 type, reserved;
    u64 sector;
};
extern volatile struct request request;
extern volatile u8 request_status;
extern volatile u64 sector_data[64 * 8];
u8 block_request(u32 type, u64 sector, u32 len);
/* The same elsewhere than in sector_data. */
u8 block_request_at(u32 type, u64 sector, volatile void *data, u32 len);
u64 block_capacity(void);

#endif
