# One round: load every register that CPL 3 can write, keep them for a while, store them.
# RDI = what to load, RSI = where to store, both laid out as Registers in registers.rs; RDX = how
# long to keep.

.set VECTORS, 512
.set MASKS, VECTORS + 32 * 64
.set GENERAL, MASKS + 64
.set KEPT_FLAGS, GENERAL + 16 * 8
.set SEGMENTS, KEPT_FLAGS + 8

.macro load_rest                # all but RDI, RSP
    mov rax, [rdi + GENERAL]
    mov rcx, [rdi + GENERAL + 8]
    mov rdx, [rdi + GENERAL + 16]
    mov rbx, [rdi + GENERAL + 24]
    mov rbp, [rdi + GENERAL + 40]
    mov rsi, [rdi + GENERAL + 48]
    .irp n, 8, 9, 10, 11, 12, 13, 14, 15
        mov r\n, [rdi + GENERAL + \n * 8]
    .endr
.endm

.macro store_rest
    mov [rdi + GENERAL], rax
    mov [rdi + GENERAL + 8], rcx
    mov [rdi + GENERAL + 16], rdx
    mov [rdi + GENERAL + 24], rbx
    mov [rdi + GENERAL + 40], rbp
    mov [rdi + GENERAL + 48], rsi
    .irp n, 8, 9, 10, 11, 12, 13, 14, 15
        mov [rdi + GENERAL + \n * 8], r\n
    .endr
.endm

.macro load_vectors prefix
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups \prefix\n, [rdi + VECTORS + \n * 64]
    .endr
.endm

.macro store_vectors prefix
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups [rdi + VECTORS + \n * 64], \prefix\n
    .endr
.endm

.macro round name, width
    .globl \name
\name:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
    push rdx
    fxrstor64 [rdi]
    .if \width == 256
        load_vectors ymm
    .endif
    .if \width == 512
        load_vectors zmm
        .irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
            vmovups zmm\n, [rdi + VECTORS + \n * 64]
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
            kmovq k\n, [rdi + MASKS + \n * 8]
        .endr
    .endif
    push qword ptr [rdi + KEPT_FLAGS]
    popfq
    load_rest
    mov rdi, [rdi + GENERAL + 56]
1:  dec qword ptr [rsp]         # leaves CF, DF, AC, ID alone
    jnz 1b
    push rdi
    mov rdi, [rsp + 16]
    store_rest
    pop rax
    mov [rdi + GENERAL + 56], rax
    pushfq
    pop qword ptr [rdi + KEPT_FLAGS]
    cld
    mov rax, fs:[0]
    mov [rdi + SEGMENTS], rax
    mov rax, gs:[0]
    mov [rdi + SEGMENTS + 8], rax
    fxsave64 [rdi]
    .if \width == 256
        store_vectors ymm
        vzeroupper
    .endif
    .if \width == 512
        store_vectors zmm
        .irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
            vmovups [rdi + VECTORS + \n * 64], zmm\n
        .endr
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7
            kmovq [rdi + MASKS + \n * 8], k\n
        .endr
        vzeroupper
    .endif
    push 0                      # flags as compiled code expects them
    popfq
    fninit
    push 0x1f80
    ldmxcsr [rsp]
    add rsp, 24
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
.endm

    .text
    round round_sse, 128
    round round_avx, 256
    round round_avx512, 512
