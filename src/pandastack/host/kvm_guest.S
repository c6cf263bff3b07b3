# The guest of kvm_probe.py: what a Linux kernel does while it starts, in small. Loaded at 0x1000, entered in real mode.
# After each step it writes the step's number to port 0x10; results are at 0x5000, tables are made by kvm_probe.py.
# as -o kvm_guest.o kvm_guest.S && objcopy -O binary kvm_guest.o kvm_guest.bin gives the bytes of kvm_probe.CODE.
    .code16
    .org 0
start:
    cli
    xor %ax,%ax
    mov %ax,%ds
    mov %ax,%es
    mov %ax,%ss
    mov $0x7000,%sp
# 1: real mode: a loop and a store
    mov $1000,%cx
    xor %ax,%ax
1:  add %cx,%ax
    loop 1b
    mov %ax,0x5000            # 500500 & 0xffff = 0xa314
    mov $1,%al
    out %al,$0x10
# 2: protected mode
    lgdtl 0x3000
    lidtl 0x3008
    mov %cr0,%eax
    or $1,%al
    mov %eax,%cr0
    ljmpl $0x08,$(0x1000+prot-start)
    .code32
prot:
    mov $0x10,%ax
    mov %ax,%ds
    mov %ax,%es
    mov %ax,%ss
    mov $0x7000,%esp
    call 2f
2:  pop %eax
    mov %eax,0x5008
    mov $2,%al
    out %al,$0x10
# 3: long mode
    mov $0x6a0,%eax           # PAE, PGE, OSFXSR, OSXMMEXCPT
    mov %eax,%cr4
    mov $0x10000,%eax
    mov %eax,%cr3
    mov $0xc0000080,%ecx
    rdmsr
    or $0x901,%eax            # SCE, LME, NXE
    wrmsr
    mov $0x80010033,%eax      # PG, WP, NE, ET, MP, PE
    mov %eax,%cr0
    ljmp $0x18,$(0x1000+long-start)
    .code64
long:
    mov $0x7000,%rsp
    mov $0xc0000080,%ecx
    rdmsr
    mov %eax,0x5010           # 0xd01: LMA is set
    movabs $0x123456789abcdef,%rax
    mov $3,%rcx
    mul %rcx
    mov %rax,0x5018
    mov $3,%al
    out %al,$0x10
# 4: SSE, CPUID, TSC
    mov $7,%eax
    cvtsi2sd %eax,%xmm0
    mulsd %xmm0,%xmm0
    sqrtsd %xmm0,%xmm1
    addsd %xmm1,%xmm0
    cvttsd2si %xmm0,%rax
    mov %rax,0x5020           # 56
    fxsave 0x5c00
    xor %eax,%eax
    cpuid
    mov %ebx,0x5028
    rdtsc
    shl $32,%rdx
    or %rdx,%rax
    mov %rax,%rbx
    mov $0x10,%ecx
    rdmsr
    shl $32,%rdx
    or %rdx,%rax
    sub %rbx,%rax
    mov %rax,0x5030           # positive: the clock goes on
    mov $4,%al
    out %al,$0x10
# 5: page fault, repaired by its handler, then run again
    movl $0x5a5a,0x201000
    mov 0x201000,%eax
    mov %eax,0x5038
    mov $5,%al
    out %al,$0x10
# 6: user mode and back: iretq, syscall, sysretq, ud2
    mov $0x40,%ax
    ltr %ax
    mov $0xc0000081,%ecx      # STAR: kernel 0x18, user base 0x20 (data 0x28, code 0x30)
    xor %eax,%eax
    mov $0x00230018,%edx
    wrmsr
    mov $0xc0000082,%ecx      # LSTAR
    mov $(0x1000+sysentry-start),%eax
    xor %edx,%edx
    wrmsr
    mov $0xc0000084,%ecx      # SFMASK
    mov $0x200,%eax
    xor %edx,%edx
    wrmsr
    pushq $0x2b
    pushq $0x8000
    pushq $0x2
    pushq $0x33
    pushq $(0x1000+user-start)
    iretq
user:
    mov $0x11,%edi
    syscall
    mov %rax,%rdi
    ud2
    hlt
sysentry:
    lea 0x100(%rdi),%rax
    sysretq
# 7: the timer of the local APIC, waited for in hlt
kernel_again:
    mov %rdi,0x5040           # 0x111: syscall and sysret worked
    mov $6,%al
    out %al,$0x10
    mov $0xfee00000,%ebx
    movl $0x1ff,0xf0(%rbx)
    movl $0xb,0x3e0(%rbx)     # divide by 1
    movl $0x40,0x320(%rbx)    # one-shot, vector 64
    movl $1000000,0x380(%rbx)
3:  sti
    hlt
    cli
    cmpl $0,0x5048
    je 3b
    mov $7,%al
    out %al,$0x10
# 8: speed: 40 million instructions, 20 ms on a CPU and many seconds in an emulator
    mov $20000000,%ecx
4:  dec %ecx
    jnz 4b
    mov $8,%al
    out %al,$0x10
    hlt
on_page_fault:
    push %rax
    mov %cr2,%rax
    mov %rax,0x5050
    mov 8(%rsp),%rax
    mov %rax,0x5058           # error code 2: a write, not present
    movq $0x180003,0x13008
    invlpg 0x201000
    pop %rax
    add $8,%rsp
    iretq
on_invalid_opcode:
# Came from user mode by ud2, with the kernel's stack out of the task segment; it never returns there.
    mov $kernel_again-start+0x1000,%eax
    jmp *%rax
on_timer:
    incl 0x5048
    push %rbx
    mov $0xfee00000,%ebx
    movl $0,0xb0(%rbx)
    pop %rbx
    iretq
# Where the handlers are, for the interrupt table: page fault, invalid opcode, timer.
    .word 0x1000+on_page_fault-start, 0x1000+on_invalid_opcode-start, 0x1000+on_timer-start
