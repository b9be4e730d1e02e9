/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that write to memory all the time. */

#include "guest.h"

/* dirty mib=MIB rate=MIB beat=N count=N: goes over that much memory from 16 MiB on, again and again, `rate` MiB a second
 * (0: as fast as it goes). Each page holds the number of the last pass at both ends, which the next pass compares: one that
 * is not what it was is told, and ends it. Every `beat` passes the number is printed; with `count`, the end comes after so many. */
void mode_dirty(void)
{
    u64 begin = 16 << 20, end = begin + (option("mib", 8) << 20), rate = option("rate", 0);
    u64 beat = option("beat", 1), count = option("count", 0), waited = 0;
    u32 last = pm_timer();
    for (u64 pass = 1; !count || pass <= count; pass++) {
        for (u64 page = begin; page < end; page += 4096) {
            volatile u64 *first = (u64 *)page, *other = (u64 *)(page + 4088);
            if (pass > 1 && (*first != pass - 1 || *other != (page ^ (pass - 1)))) {
                print("page %lx: %lx and %lx in pass %lu\n", page, *first, *other, pass);
                return;
            }
            *first = pass;
            *other = page ^ pass;
        }
        if (pass % beat == 0)
            print("pass %lu\n", pass);
        while (rate && waited * rate < ((end - begin) >> 20) * PM_TIMER_HZ) {
            u32 now = pm_timer();
            waited += (now - last) & 0xffffff;
            last = now;
        }
        waited = 0;
    }
    print("all was well\n");
}
