/* SPDX-License-Identifier: Apache-2.0 */
/* The PVH entry (32 bits, paging off, ebx: hvm_start_info) up to main() in long mode, the interrupt
 * entries, and the trampoline by which application processors get to ap_main().
 *
 * Returning from an interrupt is by iretq only: a software `int` in long mode and a 32-bit iret are what some
 * KVM back ends cannot do. */

        .section .note.pvh, "a", @note
        .align  4
        .long   4, 4, 18                /* name size, value size, XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .long   start32

        .section .text.start, "ax"
        .code32
        .globl  start32
start32:
        cld
        movl    %ebx, start_info
        movl    $stack_top, %esp
        /* 1 GiB pages may be missing: 4 GiB by 2 MiB pages. */
        movl    $page_directories, %edi
        movl    $0x83, %eax
        xorl    %edx, %edx
        movl    $2048, %ecx
1:      movl    %eax, (%edi)
        movl    %edx, 4(%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    1b
        movl    $page_directories + 3, %eax
        movl    %eax, pdpt
        addl    $0x1000, %eax
        movl    %eax, pdpt + 8
        addl    $0x1000, %eax
        movl    %eax, pdpt + 16
        addl    $0x1000, %eax
        movl    %eax, pdpt + 24
        movl    $pdpt + 3, pml4
        movl    $1f, %ebp
        jmp     long_mode
        .code64
1:      lgdt    gdt_pointer
        lidt    idt_pointer
        movl    start_info, %edi
        call    main
        .globl  halt
halt:   cli
1:      hlt
        jmp     1b

        /* From protected mode with flat segments to 64 bits, at the address in ebp. Needs no stack. */
        .code32
long_mode:
        lgdt    gdt_pointer
        movl    %cr4, %eax
        orl     $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER.LME */
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax
        movl    %eax, %cr0
        ljmp    $0x08, $1f
        .code64
1:      movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    %ebp, %ebp
        jmp     *%rbp

        .text
        /* Interrupts 32 to 47: the number to interrupt(), then iretq. */
        .macro  entry number
        .align  16
        push    $\number
        jmp     interrupt_common
        .endm
        .align  16
        .globl  interrupt_entries
interrupt_entries:
        .set    vector, 32
        .rept   16
        entry   vector
        .set    vector, vector + 1
        .endr

interrupt_common:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        movq    72(%rsp), %rdi
        cld
        call    interrupt
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rdx
        pop     %rcx
        pop     %rax
        addq    $8, %rsp
        iretq

        /* Behind an instruction of two bytes, with its fault noted. */
        .globl  protection_fault
protection_fault:
        addq    $8, %rsp                /* the error code */
        addq    $2, (%rsp)
        movl    $1, faulted
        iretq

        /* Copied to 0x8000: an application processor begins here in real mode, cs = 0x0800. */
        .globl  trampoline, trampoline_end
        .code16
        .align  16
trampoline:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   0x8000 + (trampoline_gdt - trampoline)
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $0x18, $ap_start32
        .align  4
trampoline_gdt:
        .word   gdt_end - gdt - 1
        .long   gdt
trampoline_end:

        .code32
ap_start32:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $1f, %ebp
        jmp     long_mode
        .code64
1:      lidt    idt_pointer
        movl    $1, %edi
        lock xaddl %edi, ap_count       /* edi: this processor's number, from 0 */
        movl    %edi, %eax
        incl    %eax
        shll    $12, %eax
        leaq    ap_stacks(%rax), %rsp
        call    ap_main
        jmp     halt

        .data
        .align  16
gdt:    .quad   0
        .quad   0x00af9b000000ffff      /* 0x08: 64-bit code */
        .quad   0x00cf93000000ffff      /* 0x10: data */
        .quad   0x00cf9b000000ffff      /* 0x18: 32-bit code */
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   256 * 16 - 1
        .quad   idt
        .globl  ap_count, faulted
ap_count:
        .long   0
faulted:
        .long   0

        .bss
        .align  4096
pml4:   .skip   4096
pdpt:   .skip   4096
page_directories:
        .skip   4 * 4096
        .globl  idt
idt:    .skip   256 * 16
stack:  .skip   16384
stack_top:
ap_stacks:
        .skip   16 * 4096
start_info:
        .skip   8
