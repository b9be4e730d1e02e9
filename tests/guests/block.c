/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-blk requests, one at a time. */

#include "virtio.h"

volatile struct request request;
volatile u8 request_status;
volatile u64 sector_data[64 * 8] __attribute__((aligned(4096)));

u8 block_request(u32 type, u64 sector, u32 len)
{
    return block_request_at(type, sector, sector_data, len);
}

u8 block_request_at(u32 type, u64 sector, volatile void *data, u32 len)
{
    request.type = type;
    request.reserved = 0;
    request.sector = sector;
    request_status = 0xff;
    u16 write = type == BLOCK_IN || type == BLOCK_GET_ID ? DESCRIPTOR_WRITE : 0;
    describe(0, &request, sizeof request, DESCRIPTOR_NEXT, len ? 1 : 2);
    describe(1, data, len, DESCRIPTOR_NEXT | write, 2);
    describe(2, &request_status, 1, DESCRIPTOR_WRITE, 0);
    u16 before = rings.used.index;
    offer(0);
    virtio_kick(0);
    return wait_used(before + 1) ? request_status : 0xff;
}

u64 block_capacity(void)
{
    return mmio_read(virtio.device) | (u64)mmio_read(virtio.device + 4) << 32;
}
