/* SPDX-License-Identifier: Apache-2.0 */
/* COM1, polled. Waits for the transmitter, so the host may be as slow as it likes. */

#include "guest.h"

enum { COM1 = 0x3f8, LINE_CONTROL = COM1 + 3, LINE_STATUS = COM1 + 5, DATA_READY = 1, TRANSMITTER_EMPTY = 0x20 };

void console_init(void)
{
    out8(LINE_CONTROL, 3); /* 8 bits, no parity */
    out8(COM1 + 2, 7);     /* FIFOs on and empty */
}

void put(char c)
{
    while (!(in8(LINE_STATUS) & TRANSMITTER_EMPTY))
        pause();
    out8(COM1, c);
}

int get(void)
{
    return in8(LINE_STATUS) & DATA_READY ? in8(COM1) : -1;
}

static void put_number(u64 value, u32 base)
{
    char digits[20];
    int count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        put(digits[--count]);
}

void print(const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        format++;
        int wide = *format == 'l';
        if (wide)
            format++;
        switch (*format) {
        case 's':
            for (const char *text = __builtin_va_arg(arguments, const char *); *text; text++)
                put(*text);
            break;
        case 'c':
            put(__builtin_va_arg(arguments, int));
            break;
        default:
            put_number(wide ? __builtin_va_arg(arguments, u64) : __builtin_va_arg(arguments, u32),
                       *format == 'x' ? 16 : 10);
        }
    }
    __builtin_va_end(arguments);
}
