/* SPDX-License-Identifier: Apache-2.0 */
/* Several queues of one virtio device, for devices whose queue 0 is not the one that matters. Each queue's chains
 * begin at descriptor 0 and are waited for one by one, or at a descriptor of their own. */

#ifndef QUEUES_H
#define QUEUES_H

#include "virtio.h"

enum { QUEUES_MAX = 8 };
extern volatile struct rings queues[QUEUES_MAX];

/* Resets the device, accepts what is offered, sets up queues 0 to count - 1; 0 if it is not there. */
int queues_start(u32 function, u32 device, u16 count);
void queue_describe(u16 queue, u16 index, const volatile void *address, u32 len, u16 flags, u16 next);
/* Makes the chain at `head` available, and tells the device. */
void queue_give(u16 queue, u16 head);
/* Waits until all that was made available is used; 0 if the device asks for a reset instead, or after 10 s. */
int queue_wait(u16 queue);

#endif
