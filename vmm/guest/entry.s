# From power-on to CPL 3: everything that needs privilege, and nothing else, because some hypervisors
# emulate privileged code instruction by instruction.
#
# The boot processor arrives at pvh_entry in 32-bit protected mode (PVH), the others at the trampoline's
# copy in low memory in real mode. Both end in guest_main(vCPU number) at CPL 3 on a stack of their own.

.set CR4_BITS, 0x620            # PAE, OSFXSR, OSXMMEXCPT
.set CR0_BITS, 0x80000033       # PG, NE, ET, MP, PE
.set MSR_EFER, 0xc0000080
.set EFER_BITS, 0x100           # LME
.set KERNEL_CODE, 0x10
.set KERNEL_DATA, 0x18
.set USER_DATA, 0x2b
.set USER_CODE, 0x33

.section .header, "aw"
header:
    .ascii "GodwitWG"
    .long {LAYOUT_VERSION}
    .org {TABLES_FIELD}
    .quad tables
    .org {STACKS_FIELD}
    .quad stacks
    .org {IMAGE_END_FIELD}
    .quad image_end
    .org {TRAMPOLINE_FIELD}
    .quad trampoline
    .org {TRAMPOLINE_BYTES_FIELD}
    .quad trampoline_end - trampoline
    .org 4096

.section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18              # name and descriptor sizes, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .text.entry, "ax"
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, {HEADER} + {START_INFO}

    lgdt gdt_pointer
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    movl $EFER_BITS, %eax
    xorl %edx, %edx
    wrmsr
    movl $CR0_BITS, %eax
    movl %eax, %cr0
    xorl %esi, %esi             # vCPU 0
    ljmp $KERNEL_CODE, $long_mode

.code16
trampoline:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl {TRAMPOLINE_PAGE} + trampoline_gdt_pointer - trampoline
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    movl $EFER_BITS, %eax
    xorl %edx, %edx
    wrmsr
    movl $CR0_BITS, %eax        # straight from real to long mode
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $other_vcpu
    .align 4
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

.code64
other_vcpu:
    movl $1, %esi
    lock xaddl %esi, {HEADER} + {ARRIVED}
    cmpl ${MAX_VCPUS}, %esi     # too many, or too late: then the top bit is set
    jae halt

long_mode:                      # %esi: vCPU number
    movl $KERNEL_DATA, %eax
    movl %eax, %ss
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es

    # This vCPU's clock, if the hypervisor is KVM.
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx      # "KVMK"
    jne no_clock
    movl $0x40000001, %eax
    cpuid
    movl $0x4b564d01, %ecx      # MSR_KVM_SYSTEM_TIME_NEW
    testl $8, %eax
    jnz set_clock
    movl $0x12, %ecx            # MSR_KVM_SYSTEM_TIME
    testl $1, %eax
    jz no_clock
set_clock:
    movl %esi, %eax
    imull ${VCPU_LINE_BYTES}, %eax, %eax
    addl $({HEADER} + {VCPU_LINES} + {PVCLOCK} + 1), %eax
    xorl %edx, %edx
    wrmsr
no_clock:

    leal 1(%rsi), %ebx
    imull ${STACK_BYTES}, %ebx, %ebx
    addl $stacks, %ebx
    movl %ebx, %esp

    # Only at CPL 0 can a vCPU be halted, so what may not fit is found out here.
    testl %esi, %esi
    jnz enter_user
    call {FIND_MEMORY}          # (): status
    testl %eax, %eax
    jz fits
    movl %eax, {HEADER} + {STATUS}
    jmp halt
fits:
    xorl %esi, %esi

enter_user:
    movl %esi, %edi             # guest_main's argument
    leal -8(%rbx), %eax         # as if called
    movl %ebx, %esp
    pushq $USER_DATA
    pushq %rax
    pushq $2
    pushq $USER_CODE
    pushq ${GUEST_MAIN}
    iretq

halt:
    cli
1:  hlt
    jmp 1b

    .align 8
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff    # 0x10 kernel code
    .quad 0x00cf93000000ffff    # 0x18 kernel data
    .quad 0x00cffb000000ffff    # 0x23 user code, 32-bit (unused)
    .quad 0x00cff3000000ffff    # 0x2b user data
    .quad 0x00affb000000ffff    # 0x33 user code
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

# Address for address, in pages of 2 MiB: the first 4 GiB here, what lies above is added by boot.rs.
# Accessed and dirty bits are set already, so that no CPU or hypervisor ever writes these tables.
.section .tables, "a"
    .balign 4096
tables:
pml4:
    .quad pdpt + {TABLE_FLAGS}
    .fill 511, 8, 0
pdpt:
    .set table, directories
    .rept {STATIC_GIB}
    .quad table + {TABLE_FLAGS}
    .set table, table + 4096
    .endr
    .fill 512 - {STATIC_GIB}, 8, 0
directories:
    .set address, 0
    .rept 512 * {STATIC_GIB}
    .quad address + {LARGE_PAGE_FLAGS}
    .set address, address + 0x200000
    .endr

.section .stacks, "aw", @nobits
    .balign 4096
stacks:
    .skip {MAX_VCPUS} * {STACK_BYTES}
