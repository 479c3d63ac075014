# Exceptions, interrupts, and the gate by which code at CPL 3 has something done at CPL 0.

.set FAULT, 9216                # in a vCPU's block: what fault_start reports

    .section .text, "ax", @progbits
    .code64

# An exception that nobody expects: note it down and report it at CPL 3, on the vCPU's user stack
# from its top. There is no way back.
exception:                      # vector, error code, RIP, CS, RFLAGS, RSP, SS
    mov rdi, rsp
    and rdi, -8192
    mov rdx, rdi
    add rdi, FAULT
    mov rax, [rsp]
    mov [rdi], rax
    mov rax, [rsp + 8]
    mov [rdi + 8], rax
    mov rax, [rsp + 16]
    mov [rdi + 16], rax
    mov rax, [rsp + 24]
    mov [rdi + 24], rax
    mov rax, cr2
    mov [rdi + 32], rax
    lea rax, [rdx + BLOCK - 8]
    push USER_DATA
    push rax
    push 2
    push USER_CODE
    push offset fault_start
    iretq

.macro exception_stub vector, has_code
trap_\vector:
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp exception
.endm
.irp vector, 0, 1, 2, 4, 5, 7, 9, 15, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 31
    exception_stub \vector, 0
.endr
.irp vector, 8, 10, 11, 12, 14, 17, 21, 29, 30
    exception_stub \vector, 1
.endr

# A breakpoint is counted, and its address kept.
trap_3:
    push rax
    push rdx
    mov rax, rsp
    and rax, -8192
    inc qword ptr [rax + 3 * 8]
    mov rdx, [rsp + 16]
    mov [rax + FAULT + 16], rdx
    pop rdx
    pop rax
    iretq

# The gate: `call privileged_gate` at CPL 3 runs the routine at RAX at CPL 0. It is an undefined
# instruction at one known address, because where CPL 0 is interpreted neither `syscall` nor
# `int n` works, and this does everywhere.
    .globl privileged_gate
privileged_gate:
    ud2
    ret
trap_6:
    cmp qword ptr [rsp], offset privileged_gate
    jne 1f
    add qword ptr [rsp], 2
    call rax
    iretq
1:  push 0
    push 6
    jmp exception

# An access to an MSR that does not exist goes on at probe_failed.
trap_13:
    cmp qword ptr [rsp + 8], offset probe_read
    je 1f
    cmp qword ptr [rsp + 8], offset probe_write
    je 1f
    push 13
    jmp exception
1:  add rsp, 8
    mov qword ptr [rsp], offset probe_failed
    iretq

# Interrupts are counted per vCPU and acknowledged; the guests look at the counters.
.macro pic_interrupt vector, second
trap_\vector:
    push rax
    mov rax, rsp
    and rax, -8192
    inc qword ptr [rax + \vector * 8]
    mov al, 0x20
    .if \second
    out 0xa0, al
    .endif
    out 0x20, al
    pop rax
    iretq
.endm
.irp vector, 32, 33, 34, 35, 36, 37, 38, 39
    pic_interrupt \vector, 0
.endr
.irp vector, 40, 41, 42, 43, 44, 45, 46, 47
    pic_interrupt \vector, 1
.endr

.macro apic_interrupt vector
trap_\vector:
    push rax
    mov rax, rsp
    and rax, -8192
    inc qword ptr [rax + \vector * 8]
    mov eax, 0xfee000b0         # EOI
    mov dword ptr [rax], 0
    pop rax
    iretq
.endm
.irp vector, 48, 49, 50, 51
    apic_interrupt \vector
.endr
trap_spurious:
    iretq

# The routines for the gate: arguments in RDI, RSI, RDX; they may use all that a C function may.
# The frame that iretq takes is above the return address.

    .globl privileged_rdmsr
privileged_rdmsr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    ret

    .globl privileged_wrmsr
privileged_wrmsr:
    mov ecx, edi
    mov rax, rsi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    ret

# Read MSR RDI to [RSI], or write RSI to it: RAX = 1 if that worked, 0 if it raised #GP.
    .globl privileged_read_msr
privileged_read_msr:
    mov ecx, edi
probe_read:
    rdmsr
    mov [rsi], eax
    mov [rsi + 4], edx
    mov eax, 1
    ret
    .globl privileged_write_msr
privileged_write_msr:
    mov ecx, edi
    mov rax, rsi
    mov rdx, rsi
    shr rdx, 32
probe_write:
    wrmsr
    mov eax, 1
    ret
probe_failed:
    xor eax, eax
    ret

    .globl privileged_rdtsc
privileged_rdtsc:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# CR0, CR3, CR4, CR8, DR0 to DR3, DR6, DR7, GDTR, IDTR, TR, LDTR to [RDI], as in privileged.rs.
    .globl privileged_read_control
privileged_read_control:
    mov rax, cr0
    mov [rdi], rax
    mov rax, cr3
    mov [rdi + 8], rax
    mov rax, cr4
    mov [rdi + 16], rax
    mov rax, cr8
    mov [rdi + 24], rax
    mov rax, dr0
    mov [rdi + 32], rax
    mov rax, dr1
    mov [rdi + 40], rax
    mov rax, dr2
    mov [rdi + 48], rax
    mov rax, dr3
    mov [rdi + 56], rax
    mov rax, dr6
    mov [rdi + 64], rax
    mov rax, dr7
    mov [rdi + 72], rax
    sgdt [rdi + 80]
    sidt [rdi + 96]
    str eax
    mov [rdi + 112], eax
    sldt eax
    mov [rdi + 116], eax
    ret

    .globl privileged_write_debug
privileged_write_debug:         # DR0 to DR3 and DR7 from [RDI]
    mov rax, [rdi]
    mov dr0, rax
    mov rax, [rdi + 8]
    mov dr1, rax
    mov rax, [rdi + 16]
    mov dr2, rax
    mov rax, [rdi + 24]
    mov dr3, rax
    mov rax, [rdi + 32]
    mov dr7, rax
    ret

    .globl privileged_cpuid
privileged_cpuid:               # leaf, subleaf, where EAX, EBX, ECX, EDX go
    mov eax, edi
    mov ecx, esi
    mov r8, rdx
    mov r9, rbx
    cpuid
    mov [r8], eax
    mov [r8 + 4], ebx
    mov [r8 + 8], ecx
    mov [r8 + 12], edx
    mov rbx, r9
    ret

    .globl privileged_interrupts
privileged_interrupts:          # RDI = 0x200: on at CPL 3, 0: off
    and qword ptr [rsp + 24], -0x201
    or [rsp + 24], rdi
    ret

# Wait for an interrupt unless the counter at RDI has moved on from RSI. No interrupt is lost
# between the look and the halt: they are taken only after the instruction that follows `sti`.
    .globl privileged_wait
privileged_wait:
    cmp [rdi], rsi
    jne 1f
    sti
    hlt
    cli
1:  ret

    .globl privileged_stop
privileged_stop:                # for good
    cli
    hlt
    jmp privileged_stop

    .globl privileged_triple_fault
privileged_triple_fault:
    lidt [no_idt]
    ud2

    .globl privileged_breakpoint
privileged_breakpoint:
    int3
    ret

    .globl privileged_popcnt
privileged_popcnt:
    popcnt rax, rdi
    ret

    .globl privileged_undefined
privileged_undefined:
    ud2
    ret

    .globl privileged_spin
privileged_spin:
    jmp privileged_spin

    .globl privileged_port_spin
privileged_port_spin:
    out 0x80, al
    jmp privileged_port_spin

    .section .rodata, "a", @progbits
no_idt:
    .word 0
    .quad 0

# What memory.rs puts into the IDT: vectors 0 to 51, then the spurious one.
    .balign 8
    .globl trap_stubs
trap_stubs:
.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25
    .quad trap_\vector
.endr
.irp vector, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51
    .quad trap_\vector
.endr
    .quad trap_spurious
