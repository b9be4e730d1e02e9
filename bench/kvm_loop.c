/* SPDX-License-Identifier: Apache-2.0 */
/* The least that can run the tests' bare-metal guest: KVM_RUN in a loop and a switch. What port-I/O exits cost
 * beyond this is what a virtual machine monitor adds.
 *
 *     kvm_loop GUEST "port-out count=100000"
 *
 * The guest is entered as PVH says (protected mode, flat segments, ebx: hvm_start_info). It gets 16 MiB, an
 * in-kernel interrupt controller, a console that is always ready, the PM timer at 0x608 and power off at 0x604. */

#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MEMORY = 16 << 20, START_INFO = 0x6000, COMMAND_LINE = 0x7000 };

static uint8_t *memory;

static int call(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(1, "%s", name);
    return result;
}

static uint64_t load(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        err(1, "%s", path);
    const uint8_t *file = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file == MAP_FAILED)
        err(1, "mmap");
    const Elf64_Ehdr *header = (const void *)file;
    const Elf64_Phdr *segments = (const void *)(file + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            memcpy(memory + segments[i].p_paddr, file + segments[i].p_offset, segments[i].p_filesz);
    return header->e_entry;
}

static struct kvm_segment flat(uint16_t selector, uint8_t type)
{
    return (struct kvm_segment){
        .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .db = 1, .s = 1, .g = 1
    };
}

static void enter(int vcpu, uint64_t entry)
{
    struct kvm_sregs special;
    call(vcpu, KVM_GET_SREGS, &special, "KVM_GET_SREGS");
    special.cs = flat(8, 11);
    special.ds = special.es = special.fs = special.gs = special.ss = flat(16, 3);
    special.cr0 = 0x11; /* protected mode, no paging */
    call(vcpu, KVM_SET_SREGS, &special, "KVM_SET_SREGS");
    struct kvm_regs registers = { .rip = entry, .rbx = START_INFO, .rflags = 2 };
    call(vcpu, KVM_SET_REGS, &registers, "KVM_SET_REGS");
}

static void supported_cpuid(int kvm, int vcpu)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + 256 * sizeof *cpuid->entries);
    if (!cpuid)
        err(1, "calloc");
    cpuid->nent = 256;
    call(kvm, KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID");
    call(vcpu, KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2");
    free(cpuid);
}

static uint32_t pm_timer(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 3579545ull + now.tv_nsec * 3579545ull / 1000000000;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        errx(2, "usage: kvm_loop GUEST COMMAND-LINE");
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(1, "/dev/kvm");
    int vm = call(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    call(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000, "KVM_SET_TSS_ADDR");
    call(vm, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    struct kvm_userspace_memory_region region = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory };
    call(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    int vcpu = call(vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
    supported_cpuid(kvm, vcpu);
    size_t size = call(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(1, "mmap of the vCPU");

    struct { uint32_t magic, version, flags, modules; uint64_t module_list, command_line; } start_info = {
        .magic = 0x336ec578, .version = 1, .command_line = COMMAND_LINE
    };
    uint64_t entry = load(argv[1]);
    memcpy(memory + START_INFO, &start_info, sizeof start_info);
    strncpy((char *)memory + COMMAND_LINE, argv[2], 255);
    enter(vcpu, entry);

    for (;;) {
        call(vcpu, KVM_RUN, NULL, "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO)
            errx(1, "exit reason %u", run->exit_reason);
        uint8_t *data = (uint8_t *)run + run->io.data_offset;
        if (run->io.direction == KVM_EXIT_IO_OUT) {
            if (run->io.port == 0x3f8)
                putchar(*data);
            else if (run->io.port == 0x604)
                return 0;
        } else {
            uint32_t value = run->io.port == 0x3fd ? 0x60 : run->io.port == 0x608 ? pm_timer() : 0xffffffff;
            memcpy(data, &value, run->io.size);
        }
    }
}
