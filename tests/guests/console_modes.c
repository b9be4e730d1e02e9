/* SPDX-License-Identifier: Apache-2.0 */
/* Modes that use the console and nothing else. */

#include "guest.h"

/* Says hello and powers off. */
void mode_hello(void)
{
    print("hello: %s\n", (const char *)boot_info->cmdline);
}

/* Says that it sleeps, and does. */
void mode_idle(void)
{
    print("idle\n");
    halt();
}

/* Gives each byte back, until `q`. */
void mode_echo(void)
{
    print("ready\n");
    for (;;) {
        int c = get();
        if (c < 0) {
            pause();
            continue;
        }
        put(c);
        if (c == 'q')
            break;
    }
    print("\nbye\n");
}

/* Prints numbered lines as fast as the host takes them: count=N, or without end. */
void mode_flood(void)
{
    u64 count = option("count", 0);
    for (u64 i = 0; !count || i < count; i++)
        print("line %lu\n", i);
    print("flooded\n");
}
