/* SPDX-License-Identifier: Apache-2.0 */
/* plug count=N: serves the hotplug slots, as a system with a PCIe hotplug driver would, until N devices have gone.
 *
 * What comes gets its BAR at the start of its port's 32-bit window; a disk's first sector is written. What the host asks
 * back is let go at once, or never with the word "stubborn". What becomes of the last one's configuration is told. */

#include "virtio.h"

enum { PORTS = 8, EXPRESS = 0x10, SLOT_CONTROL = 24, SLOT_STATUS = 26 };
enum { ATTENTION = 1 << 0, PRESENCE_CHANGED = 1 << 3, PRESENT = 1 << 6, LINK_CHANGED = 1 << 8 };
enum { INDICATOR_ON = 1 << 8, INDICATOR_OFF = 3 << 8 };

enum { GENERATION = 21, LINK_STATUS = 6 };

static u32 went;
static u8 generation;

static void came(u32 slot, u32 port)
{
    u32 function = slot << 8;
    pci_write(function, 0x10, 4, (pci_read(port, 0x20, 2) & 0xfff0) << 16);
    pci_write(function, 0x14, 4, 0);
    if (!virtio_find(function)) {
        print("plug: slot %u: no virtio device\n", slot);
        return;
    }
    u32 device = pci_read(function, 2, 2);
    generation = *(volatile u8 *)(virtio.common + GENERATION);
    if (device != 0x1042) {
        print("plug: slot %u has %x\n", slot, device);
        return;
    }
    sector_data[0] = 0x7375626d76;
    u8 status = virtio_start(0, 0) ? block_request(BLOCK_OUT, 0, 512) : 0xff;
    print("plug: slot %u has a disk of %lu sectors, written: %u\n", slot, block_capacity(), status);
}

static void changed(void)
{
    u8 now = *(volatile u8 *)(virtio.common + GENERATION);
    if (now == generation)
        return;
    generation = now;
    u32 slot = virtio.function >> 8;
    if (pci_read(virtio.function, 2, 2) == 0x1041)
        print("plug: slot %u: link %s\n", slot, *(volatile u16 *)(virtio.device + LINK_STATUS) & 1 ? "up" : "down");
    else
        print("plug: slot %u has %lu sectors, status %x\n", slot, block_capacity(), *(volatile u8 *)virtio.isr);
}

static void serve(u32 slot, u32 port, u32 express)
{
    u32 status = pci_read(port, express + SLOT_STATUS, 2);
    if (!(status & (ATTENTION | PRESENCE_CHANGED | LINK_CHANGED)))
        return;
    pci_write(port, express + SLOT_STATUS, 2, status & (ATTENTION | PRESENCE_CHANGED | LINK_CHANGED));
    if (status & (PRESENCE_CHANGED | LINK_CHANGED)) {
        if (status & PRESENT) {
            pci_write(port, express + SLOT_CONTROL, 2, INDICATOR_ON);
            came(slot, port);
        } else {
            print("plug: slot %u is empty\n", slot);
            went++;
        }
    }
    if (status & ATTENTION) {
        print("plug: slot %u is asked for\n", slot);
        if (!has_word("stubborn")) {
            if (virtio.function == slot << 8)
                virtio_reset();
            pci_write(port, express + SLOT_CONTROL, 2, INDICATOR_OFF);
        }
    }
}

void mode_plug(void)
{
    u32 count = option("count", 1);
    for (u32 slot = 1; slot <= PORTS; slot++)
        if (pci_read(slot << 8, 0, 4) != 0xffffffff) {
            print("plug: slot %u is filled\n", slot);
            came(slot, 0x80 + slot - 1);
        }
    print("plug: ready\n");
    while (went < count) {
        for (u32 slot = 1; slot <= PORTS; slot++) {
            u32 port = 0x80 + slot - 1;
            serve(slot, port, pci_capability(port, EXPRESS, 0));
        }
        if (virtio.function && pci_read(virtio.function, 0, 4) != 0xffffffff)
            changed();
    }
}
