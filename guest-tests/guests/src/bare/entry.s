# From the VMM's entry to CPL 3, for every vCPU. Privileged code is kept to what must be
# privileged: a KVM without hardware virtualization interprets it, slowly and not all of it.

.set CODE64, 0x08               # selectors
.set DATA, 0x10
.set CODE32, 0x18
.set USER_DATA, 0x23
.set USER_CODE, 0x2b
.set FIRST_TSS, 0x30
.set MAX_CPUS, 32
.set BLOCK_SHIFT, 16            # a vCPU's block, laid out as in cpu.rs
.set BLOCK, 1 << BLOCK_SHIFT
.set KERNEL_STACK_TOP, 8192     # the counters of its interrupts are below the stack
.set TSS, 8192
.set TSS_BITMAP, 104
.set BITMAP_BYTES, 512          # ports 0 to 0xfff, all allowed

.set ENTRY_PVH, 0
.set ENTRY_LINUX64, 1
.set ENTRY_SECOND, 2

    .section .text.entry, "ax", @progbits

# PVH (xen/include/public/arch-x86/hvm/start_info.h): 32-bit, no paging, EBX = hvm_start_info.
    .code32
    .globl pvh_entry
pvh_entry:
    cld
    mov edi, ebx
    mov ebp, offset pvh_long
    jmp to_long_mode

second_protected:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebp, offset second_long

to_long_mode:                   # goes on at EBP, keeps EDI
    lgdt [gdt_pointer]
    mov eax, cr4
    or eax, 0x620               # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER
    rdmsr
    or eax, 0x900               # LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3         # not CD, NW, TS, EM
    or eax, 0x80010023          # PG, WP, NE, MP, PE
    mov cr0, eax
    .byte 0xea                  # far jump
    .long long_mode
    .word CODE64

    .code64
long_mode:
    mov ebp, ebp                # the upper halves are undefined after the switch
    mov edi, edi
    jmp rbp

pvh_long:
    mov esi, ENTRY_PVH
    xor r14d, r14d
    jmp start_vcpu

second_long:
    mov r14d, 1
    lock xadd [seconds_arrived], r14d
    inc r14d
    cmp r14d, MAX_CPUS
    jae park
    mov esi, ENTRY_SECOND
    xor edi, edi
    jmp start_vcpu
park:
    cli
    hlt
    jmp park

# The 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst): long mode, identity mapped,
# RSI = boot_params.
    .globl linux64_entry
linux64_entry:
    cli
    cld
    mov rdi, rsi
    mov esi, ENTRY_LINUX64
    lgdt [gdt_pointer]
    mov rax, cr4
    or rax, 0x620
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    mov rax, cr0
    and eax, 0x9ffffff3
    or eax, 0x80010023
    mov cr0, rax
    xor r14d, r14d

# RDI and RSI are for user_start, R14 is the index of this vCPU.
start_vcpu:
    mov r15d, r14d
    shl r15d, BLOCK_SHIFT
    add r15d, offset vcpu_blocks
    lea rsp, [r15 + KERNEL_STACK_TOP]

    # x87, SSE, AVX and, if complete, AVX-512.
    mov eax, 1
    xor ecx, ecx
    cpuid
    test ecx, 1 << 26           # XSAVE
    jz 2f
    mov rax, cr4
    or rax, 1 << 18             # OSXSAVE
    mov cr4, rax
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 0xe7
    mov edx, eax
    and edx, 0xe0
    cmp edx, 0xe0
    je 1f
    and eax, 7
1:  xor edx, edx
    xor ecx, ecx
    xsetbv
2:
    # Its task state: the stack for traps and the ports that CPL 3 may use.
    lea rax, [r15 + KERNEL_STACK_TOP]
    mov [r15 + TSS + 4], rax
    mov word ptr [r15 + TSS + 102], TSS_BITMAP
    mov byte ptr [r15 + TSS + TSS_BITMAP + BITMAP_BYTES], 0xff
    lea rax, [r15 + TSS]
    mov ecx, r14d
    shl ecx, 4
    lea rdx, [rcx + gdt + FIRST_TSS]
    mov word ptr [rdx], TSS_BITMAP + BITMAP_BYTES
    mov [rdx + 2], ax
    shr eax, 16
    mov [rdx + 4], al
    mov byte ptr [rdx + 5], 0x89
    mov byte ptr [rdx + 6], 0
    mov [rdx + 7], ah
    mov qword ptr [rdx + 8], 0
    lidt [idt_pointer]
    add ecx, FIRST_TSS
    ltr cx

    mov eax, USER_DATA
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov rdx, r15
    lea rax, [r15 + BLOCK - 8]
    push USER_DATA
    push rax
    push 2                      # RFLAGS: interrupts off
    push USER_CODE
    push offset user_start
    iretq

# Where a second vCPU begins: copied to a page below 1 MiB, in real mode, CS = that page.
    .globl trampoline
    .globl trampoline_end
    .code16
trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16            # lgdt with a 32-bit base
    .word trampoline_gdt - trampoline
    mov eax, cr0
    and eax, 0x9fffffff
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                        # far jump, 32-bit
    .long second_protected
    .word CODE32
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
    .code64

    .section .data.entry, "aw", @progbits
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # CODE64
    .quad 0x00cf93000000ffff    # DATA
    .quad 0x00cf9b000000ffff    # CODE32
    .quad 0x00cff3000000ffff    # USER_DATA
    .quad 0x00affb000000ffff    # USER_CODE
    .skip MAX_CPUS * 16         # FIRST_TSS
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
    .balign 4
    .globl seconds_arrived
seconds_arrived:
    .long 0

# The first GiB, in pages of 2 MiB, for every privilege level. memory.rs maps the rest.
    .balign 4096
    .globl pdpt
pml4:
    .quad pdpt + 7
    .skip 4096 - 8
pdpt:
    .quad low_gib + 7
    .skip 4096 - 8
low_gib:
    .set page, 0
    .rept 512
    .quad page + 0xe7           # present, writable, user, accessed, dirty, large
    .set page, page + 0x200000
    .endr

    .section .bss.entry, "aw", @nobits
    .balign 65536
    .globl vcpu_blocks
vcpu_blocks:
    .skip MAX_CPUS * BLOCK
    .balign 16
    .globl idt
idt:
    .skip 256 * 16
