/* SPDX-License-Identifier: Apache-2.0 */
/* What the modes of the bare-metal guest share: ports, the console, the platform. */

#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

/* include/public/arch-x86/hvm/start_info.h of Xen */
struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, cmdline, rsdp, memory_map;
    u32 memory_map_entries, reserved;
};

struct module {
    u64 address, size, cmdline, reserved;
};

struct memory_map_entry {
    u64 address, size;
    u32 type, reserved;
};

extern const struct start_info *boot_info;

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { asm volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 value; asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u16 in16(u16 port) { u16 value; asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u32 in32(u16 port) { u32 value; asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }

static inline u32 mmio_read(u64 address) { return *(volatile u32 *)address; }
static inline void mmio_write(u64 address, u32 value) { *(volatile u32 *)address = value; }

static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static inline void barrier(void) { asm volatile("" : : : "memory"); }
static inline void pause(void) { asm volatile("pause"); }
/* Interrupts on, sleep, off again: one that comes in between is not missed. */
static inline void wait_for_interrupt(void) { asm volatile("sti; hlt; cli" : : : "memory"); }

/* console.c: COM1, polled. */
void console_init(void);
void put(char c);
int get(void); /* the next byte, or -1 */
/* Knows %s %c %u (u32) %lu (u64) %x %lx. */
void print(const char *format, ...);

/* main.c: the command line. */
u64 option(const char *name, u64 otherwise); /* of name=NUMBER */
int has_word(const char *word);

/* platform.c */
enum { PM1_STATUS = 0x600, PM1_ENABLE = 0x602, PM1_CONTROL = 0x604, PM_TIMER = 0x608, PM_TIMER_HZ = 3579545 };
enum { POWER_BUTTON = 1 << 8 };
void power_off(void) __attribute__((noreturn));
void halt(void) __attribute__((noreturn));
u32 pm_timer(void);
void delay_us(u32 microseconds);
u8 cmos_read(u8 index);
void cmos_write(u8 index, u8 value);
/* Sets up the local APIC and the interrupt table, with the 8259s masked. */
void interrupts_init(void);
/* Sends an I/O APIC pin to vector 32 + line of this processor. */
void route(u32 pin, u32 line, int level);
/* How often vector 32 + line came. */
u32 interrupt_count(u32 line);
/* Called by an interrupt, before its end is signalled; 0 for none. */
void on_interrupt(u32 line, void (*handler)(void));

/* From now on an instruction of two bytes that is a general protection fault is skipped. */
void catch_faults(void);
/* 0 for a register that there is not; after catch_faults. */
int read_msr(u32 msr, u64 *value);

typedef void (*mode_function)(void);
struct mode {
    const char *name;
    mode_function run;
};

/* Modes, each in the file that is named for what it tries. */
void mode_hello(void);
void mode_idle(void);
void mode_echo(void);
void mode_flood(void);
void mode_wait_power_button(void);
void mode_sci(void);
void mode_reset_once(void);
void mode_triple_fault(void);
void mode_bad_instruction(void);
void mode_port_out(void);
void mode_ticks(void);
void mode_smp(void);
void mode_acpi(void);
void mode_memory(void);
void mode_fill(void);
void mode_dirty(void);
void mode_cpuid(void);
void mode_clock(void);
void mode_pci_list(void);
void mode_disk_read(void);
void mode_disk_id(void);
void mode_disk_pattern(void);
void mode_disk_span(void);
void mode_disk_zero(void);
void mode_disk_load(void);
void mode_disk_loop(void);
void mode_disk_interrupt(void);
void mode_disk_hostile(void);
void mode_random(void);
void mode_net_echo(void);
void mode_balloon(void);
void mode_balloon_hostile(void);
void mode_report(void);
void mode_panic(void);
void mode_shadow(void);
void mode_fw_cfg(void);
void mode_net_reach(void);
void mode_net_serve(void);
void mode_plug(void);
void mode_net_spoof(void);
void mode_net_hear(void);
void mode_net_sort(void);
void mode_net_break(void);
void mode_net_ping(void);
void mode_scsi(void);
void mode_scsi_hostile(void);
void mode_ports(void);
void mode_watchdog(void);
void mode_ports_hostile(void);
void mode_vsock(void);
void mode_rtc(void);
void mode_rtc_seconds(void);
void mode_vsock_hostile(void);
void mode_registers(void);
void mode_board(void);

#endif
