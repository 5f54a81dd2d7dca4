/*
 * The payload's lowest part: entry by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst), exceptions that are
 * survived, and the second processor's way from real mode.
 */
#include "layout.h"

	.section .head, "ax"
	.code64
	.globl _start
_start:
	/* rsi = boot parameters; flat segments, the first 4 GiB mapped one to one. */
	cli
	lea	bss_start(%rip), %rdi
	lea	bss_end(%rip), %rcx
	sub	%rdi, %rcx
	xor	%eax, %eax
	cld
	rep stosb
	lea	stacks + STACK_SIZE(%rip), %rsp
	lgdt	own_gdt(%rip)
	mov	%rsi, %rdi
	call	main_boot
1:	hlt
	jmp	1b

	.balign 8
/* As the boot protocol wants it: 0x10 code, 0x18 data. */
gdt:
	.quad	0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
own_gdt:
	.word	31
	.quad	gdt

	.text
/*
 * int try_call(struct cpu *cpu, void (*f)(struct cpu *)): 0 when f returned, 1 when an exception ended it.
 * The exception handler comes back to `recover` with the stack as it is noted here.
 */
	.globl try_call
try_call:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rsp, CPU_RESUME(%rdi)
	push	%rdi
	call	*%rsi
	pop	%rdi
	xor	%eax, %eax
	jmp	2f
recover:
	/* rdi = this processor */
	mov	CPU_RESUME(%rdi), %rsp
	mov	$1, %eax
2:	movq	$0, CPU_RESUME(%rdi)
	/* Flags that C relies on, interrupts on, no single steps. */
	pushq	$0x202
	popfq
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

/* One entry of 16 bytes for each vector: a zero where the processor pushes no error code, then the vector. */
	.balign	16
	.globl entries
entries:
	.set	vector, 0
	.rept	256
	.balign	16
	.if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
	.else
	pushq	$0
	.endif
	pushq	$vector
	jmp	common
	.set	vector, vector + 1
	.endr

common:
	push	%rax
	push	%rcx
	push	%rdx
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	cld
	mov	72(%rsp), %rsi
	mov	88(%rsp), %rdx
	mov	%rsp, %rdi
	and	$-STACK_SIZE, %rdi
	push	%rdi
	call	trapped
	pop	%rdi
	test	%eax, %eax
	jnz	recover
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rdx
	pop	%rcx
	pop	%rax
	add	$16, %rsp
	iretq

/* What a processor runs after its start-up interrupt, copied to TRAMPOLINE. */
	.globl trampoline, trampoline_end
	.code16
trampoline:
	cli
	xor	%eax, %eax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	lgdtl	TRAMPOLINE + (gdt_pointer - trampoline)
	mov	%cr4, %eax
	or	$0x20, %eax
	mov	%eax, %cr4
	mov	$PML4, %eax
	mov	%eax, %cr3
	mov	$0xC0000080, %ecx
	rdmsr
	or	$0x100, %eax
	wrmsr
	mov	$0x80000011, %eax
	mov	%eax, %cr0
	ljmpl	$0x10, $(TRAMPOLINE + (trampoline_64 - trampoline))
	.balign 4
gdt_pointer:
	.word	31
	.long	gdt
	.code64
trampoline_64:
	mov	$0x18, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$(stacks + 2 * STACK_SIZE), %rsp
	mov	$main_second, %rax
	call	*%rax
1:	hlt
	jmp	1b
trampoline_end:
	.section .note.GNU-stack, "", @progbits
