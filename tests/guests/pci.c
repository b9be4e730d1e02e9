/* SPDX-License-Identifier: Apache-2.0 */
/* PCI configuration space of bus 0. */

#include "virtio.h"

static u64 address(u32 function, u32 offset)
{
    return ECAM + ((u64)function << 12) + offset;
}

u32 pci_read(u32 function, u32 offset, u32 bytes)
{
    u64 at = address(function, offset);
    return bytes == 1 ? *(volatile u8 *)at : bytes == 2 ? *(volatile u16 *)at : *(volatile u32 *)at;
}

void pci_write(u32 function, u32 offset, u32 bytes, u32 value)
{
    u64 at = address(function, offset);
    if (bytes == 1)
        *(volatile u8 *)at = value;
    else if (bytes == 2)
        *(volatile u16 *)at = value;
    else
        *(volatile u32 *)at = value;
}

u32 pci_read_ports(u32 function, u32 offset)
{
    out32(0xcf8, 0x80000000 | function << 8 | offset);
    return in32(0xcfc);
}

u32 pci_capability(u32 function, u32 id, u32 after)
{
    if (!(pci_read(function, 6, 2) & 0x10))
        return 0;
    u32 at = after ? pci_read(function, after + 1, 1) : pci_read(function, 0x34, 1);
    for (u32 i = 0; at && i < 48; i++) {
        if (pci_read(function, at, 1) == id)
            return at;
        at = pci_read(function, at + 1, 1);
    }
    return 0;
}

u32 disk_function(u32 index)
{
    return (1 + index / 8) << 3 | index % 8;
}

/* Every function, as both mechanisms show it. */
void mode_pci_list(void)
{
    for (u32 function = 0; function < 256; function++) {
        u32 id = pci_read(function, 0, 4);
        if (id == 0xffffffff)
            continue;
        print("pci: %x.%x %x class %x bar %x%s\n", function >> 3, function & 7, id, pci_read(function, 8, 4) >> 8,
              pci_read(function, 0x10, 4), pci_read_ports(function, 0) == id ? "" : " PORTS DIFFER");
    }
}
