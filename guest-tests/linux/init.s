# The only process of the small Linux test guest: fills 4 MiB (a page fault is thousands of
# instructions of the kernel's, and not every KVM is quick at those), then without end counts every
# word of them up, checking what it was. It makes no system call (not every KVM can), so it is seen
# by its registers: R15 counts the passes. What it finds damaged ends it: an undefined instruction,
# with the address in RDI, what was expected in RSI and what was found in RDX; the kernel panics.

        .globl  _start
        .set    WORDS, 4 << 17

_start:
        xorl    %r15d, %r15d
        leaq    words(%rip), %r14
        # A word holds its number times an odd constant, plus the passes.
        movabsq $0x9e3779b97f4a7c15, %r13
        xorl    %ecx, %ecx
        xorl    %eax, %eax
fill:   movq    %rax, (%r14, %rcx, 8)
        addq    %r13, %rax
        incq    %rcx
        cmpq    $WORDS, %rcx
        jb      fill

pass:   movq    %r15, %rsi
        xorl    %ecx, %ecx
check:  movq    (%r14, %rcx, 8), %rdx
        cmpq    %rdx, %rsi
        jne     damage
        incq    %rdx
        movq    %rdx, (%r14, %rcx, 8)
        addq    %r13, %rsi
        incq    %rcx
        cmpq    $WORDS, %rcx
        jb      check
        incq    %r15
        jmp     pass

damage: leaq    (%r14, %rcx, 8), %rdi
        ud2

        .lcomm  words, WORDS * 8
        .section .note.GNU-stack, "", @progbits
