/* SPDX-License-Identifier: Apache-2.0 */
/* Network interface 0, one frame at a time. */

#ifndef NET_H
#define NET_H

#include "guest.h"

extern u8 net_mac[6];
/* Where a frame to be sent is written, up to 1514 bytes. */
extern volatile u8 *const net_out;

extern int net_control; /* set before net_start: commands will be given */
int net_start(void); /* 0 if there is none */
u32 net_command(const u8 *bytes, u32 len); /* up to 60 bytes; the device's answer: 0 for done */
void net_send(u32 len); /* waits until the device has it */
const volatile u8 *net_receive(u32 *len); /* 0 if nothing has come */
void net_done(void); /* with the frame that net_receive gave */
int net_broken(void); /* it needs a reset */
void net_break(void); /* offers a descriptor that does not exist, to be sent */

void copy(volatile u8 *to, const volatile u8 *from, u32 len);
int same(const volatile u8 *a, const u8 *b, u32 len);

#endif
