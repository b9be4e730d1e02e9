/* SPDX-License-Identifier: Apache-2.0 */
/* The first word of the command line is the mode; further words are its options. */

#include "guest.h"

const struct start_info *boot_info;

static const struct mode modes[] = {
    { "hello", mode_hello },
    { "idle", mode_idle },
    { "echo", mode_echo },
    { "flood", mode_flood },
    { "wait-power-button", mode_wait_power_button },
    { "sci", mode_sci },
    { "reset-once", mode_reset_once },
    { "triple-fault", mode_triple_fault },
    { "bad-instruction", mode_bad_instruction },
    { "port-out", mode_port_out },
    { "ticks", mode_ticks },
    { "smp", mode_smp },
    { "acpi", mode_acpi },
    { "memory", mode_memory },
    { "fill", mode_fill },
    { "dirty", mode_dirty },
    { "cpuid", mode_cpuid },
    { "clock", mode_clock },
    { "pci-list", mode_pci_list },
    { "disk-read", mode_disk_read },
    { "disk-id", mode_disk_id },
    { "disk-pattern", mode_disk_pattern },
    { "disk-span", mode_disk_span },
    { "disk-zero", mode_disk_zero },
    { "disk-load", mode_disk_load },
    { "disk-loop", mode_disk_loop },
    { "disk-interrupt", mode_disk_interrupt },
    { "disk-hostile", mode_disk_hostile },
    { "random", mode_random },
    { "net-echo", mode_net_echo },
    { "balloon", mode_balloon },
    { "balloon-hostile", mode_balloon_hostile },
    { "report", mode_report },
    { "panic", mode_panic },
    { "shadow", mode_shadow },
    { "fw-cfg", mode_fw_cfg },
    { "net-reach", mode_net_reach },
    { "net-serve", mode_net_serve },
    { "plug", mode_plug },
    { "net-spoof", mode_net_spoof },
    { "net-hear", mode_net_hear },
    { "net-sort", mode_net_sort },
    { "net-break", mode_net_break },
    { "net-ping", mode_net_ping },
    { "scsi", mode_scsi },
    { "scsi-hostile", mode_scsi_hostile },
    { "ports", mode_ports },
    { "watchdog", mode_watchdog },
    { "ports-hostile", mode_ports_hostile },
    { "vsock", mode_vsock },
    { "rtc", mode_rtc },
    { "rtc-seconds", mode_rtc_seconds },
    { "vsock-hostile", mode_vsock_hostile },
    { "registers", mode_registers },
    { "board", mode_board },
};

/* Whether a word (up to a blank, or '=' if value) begins here; what follows it then, else 0. */
static const char *match(const char *text, const char *word, char end)
{
    while (*word && *text == *word)
        text++, word++;
    if (*word)
        return 0;
    if (end == '=')
        return *text == '=' ? text + 1 : 0;
    return *text == ' ' || !*text ? text : 0;
}

static const char *find(const char *word, char end)
{
    const char *text = (const char *)boot_info->cmdline;
    while (*text) {
        const char *after = match(text, word, end);
        if (after)
            return after;
        while (*text && *text != ' ')
            text++;
        while (*text == ' ')
            text++;
    }
    return 0;
}

int has_word(const char *word)
{
    return find(word, ' ') != 0;
}

u64 option(const char *name, u64 otherwise)
{
    const char *text = find(name, '=');
    if (!text)
        return otherwise;
    u64 value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (*text - '0');
    return value;
}

void main(const struct start_info *info)
{
    boot_info = info;
    console_init();
    for (u32 i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (match((const char *)info->cmdline, modes[i].name, ' ')) {
            modes[i].run();
            power_off();
        }
    }
    print("no such mode: %s\n", (const char *)info->cmdline);
    power_off();
}
