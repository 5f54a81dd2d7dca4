/*
 * A guest that means harm: random and half-right accesses to everything a guest can reach, for as long as it runs.
 * Command line: seed=N cpus=N. The same seed makes the same choices; each further boot adds one to it.
 */
#include "vmbus.h"

u8 stacks[PROCESSORS][STACK_SIZE] __attribute__((aligned(STACK_SIZE), section(".stacks")));

extern const u8 entries[256][16];
extern const u8 trampoline[], trampoline_end[];

static struct {
	u16 low, selector, flags, middle;
	u32 high, zero;
} __attribute__((packed)) idt[256] __attribute__((aligned(16)));

static u64 seed;
static u64 processors = 1;

/* Effort between two lines on the console. */
#define REPORT 0x10000

/* --- console --- */

static void put(char c)
{
	for (int tries = 0; tries < 100 && !(in8(COM1 + 5) & 0x20); tries++)
		;
	out8(COM1, (u8)c);
}

void print(const char *text)
{
	while (*text)
		put(*text++);
}

void print_number(const char *name, u64 value)
{
	char digits[21];
	int at = 20;
	digits[20] = 0;
	do {
		digits[--at] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	print(name);
	print(digits + at);
}

/* --- traps --- */

/* Called by every vector: 1 = give up what is being tried, 0 = go on after it. */
int trapped(struct cpu *cpu, u64 vector, u64 where)
{
	(void)where;
	if (vector >= 32 || vector == 2) {
		cpu->interrupts++;
		if (vector >= 32 && !rare(cpu, 64))
			*(volatile u32 *)0xFEE000B0 = 0;
		return 0;
	}
	cpu->faults++;
	if (!cpu->resume) {
		print_number("\nhostile: fatal exception ", vector);
		print_number(" at ", where);
		print("\n");
		out8(0x600, 5 << 2 | 1 << 5);
		for (;;)
			__asm__ volatile("hlt");
	}
	return 1;
}

static void load_idt(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = {sizeof(idt) - 1, (u64)idt};
	__asm__ volatile("lidt %0" : : "m"(pointer));
}

/* --- random steps --- */

u64 odd(struct cpu *cpu)
{
	u64 bit = 1ull << below(cpu, 64);
	switch (below(cpu, 8)) {
	case 0: return below(cpu, 16);
	case 1: return bit;
	case 2: return bit - 1;
	case 3: return bit + 1;
	case 4: return ~below(cpu, 16);
	case 5: return (ARENA + below(cpu, ARENA_END - ARENA)) & ~7ull;
	case 6: return ((ARENA + below(cpu, 0x20000)) & ~0xFFFull) | below(cpu, 4);
	default: return next(cpu);
	}
}

static u32 some_msr(struct cpu *cpu)
{
	static const u32 known[] = {
		0x10, 0x1B, 0x3A, 0x8B, 0xFE, 0x174, 0x175, 0x176, 0x179, 0x17A, 0x1A0, 0x1D9, 0x1DB, 0x200, 0x277, 0x2FF, 0x345,
		0x38F, 0x400, 0x480, 0x6E0, 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103,
		0xC0010015, 0xC0010058, 0xC0010114, 0xC0010117, 0xC001001F, 0xC0011020, 0x4B564D00, 0x4B564D01, 0x4B564D02,
		0x4B564D03, 0x4B564D04, 0xDA0, 0x48, 0x49, 0x122,
	};
	switch (below(cpu, 8)) {
	case 0: return (u32)next(cpu);
	case 1: return known[below(cpu, ARRAY(known))];
	case 2: return 0x800 + (u32)below(cpu, 0x100);
	case 3: return 0x40000000 + (u32)below(cpu, 0x200);
	case 4: return MSR_SINT0 + (u32)below(cpu, 16);
	case 5: return 0x400000B0 + (u32)below(cpu, 8);
	default: return MSR_SCONTROL + (u32)below(cpu, 5);
	}
}

static void write_msr(struct cpu *cpu)
{
	u32 msr = some_msr(cpu);
	u64 value = odd(cpu);
	/* What ends the machine is done too, but seldom: RESET, the crash report, an INIT to a processor. */
	if ((msr == 0x40000003 || msr == 0x40000105) && !rare(cpu, 256))
		return;
	if (msr == 0x830 && !rare(cpu, 256))
		value &= ~0x700ull;
	wrmsr(msr, value);
}

static void read_msr(struct cpu *cpu)
{
	rdmsr(some_msr(cpu));
}

static void any_hypercall(struct cpu *cpu)
{
	static const u16 codes[] = {0x01, 0x02, 0x03, 0x08, 0x0B, 0x13, 0x14, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x50, 0x51,
				    0x52, 0x57, 0x58, 0x5C, 0x5C, 0x5D, 0x5D, 0x69, 0x6A, 0x76, 0x7A, 0x7C, 0x87, 0x95, 0xAF, 0xC1};
	u64 control = rare(cpu, 4) ? next(cpu) & 0xFFFF : codes[below(cpu, ARRAY(codes))];
	if (rare(cpu, 2))
		control |= 1ull << 16;
	if (rare(cpu, 4))
		control |= odd(cpu) << 17;
	u64 input = rare(cpu, 4) ? odd(cpu) : INPUT(cpu->index);
	if (input == INPUT(cpu->index) && !rare(cpu, 4))
		for (u32 at = 0; at < 8; at++)
			((volatile u32 *)input)[at] = (u32)odd(cpu);
	if ((control & 0xFFFF) == CALL_SIGNAL_EVENT && rare(cpu, 2))
		input = some_relid(cpu) + 0x10000;
	hypercall(control, input, rare(cpu, 2) ? INPUT(1 - cpu->index) : odd(cpu));
}

/* A channel message of any kind with fields that are often right. */
static void any_message(struct cpu *cpu)
{
	u32 words[60];
	u32 count = 2 + (u32)below(cpu, 58);
	words[0] = rare(cpu, 16) ? (u32)odd(cpu) : 1 + (u32)below(cpu, 30);
	words[1] = 0;
	for (u32 at = 2; at < count; at++)
		words[at] = rare(cpu, 2) ? some_relid(cpu) : (u32)odd(cpu);
	/* A new contact or an unload ends what else is going on. */
	if ((words[0] == 14 || words[0] == 16) && !rare(cpu, 32))
		words[0] = 8;
	post(cpu, rare(cpu, 8) ? (u32)odd(cpu) : rare(cpu, 2) ? 1 : 4, (const u8 *)words, count * 4);
}

static void scribble(struct cpu *cpu)
{
	static const u64 places[][2] = {
		{SIMP(0), 0x2000}, {SIEFP(0), 0x2000}, {RINGS, 0x50}, {RINGS + RING_PAGES / 2 * 4096, 0x50},
		{RINGS, RING_PAGES * 4096}, {SEND_BUFFER, SEND_PAGES * 4096}, {RECEIVE_BUFFER, RECEIVE_PAGES * 4096},
		{HYPERCALL_PAGE, 0x1000}, {ARENA, ARENA_END - ARENA},
	};
	const u64 *place = places[below(cpu, ARRAY(places))];
	u64 at = place[0] + below(cpu, place[1]);
	u64 count = 1 + below(cpu, 16);
	while (count-- && at < ARENA_END - 8) {
		if (rare(cpu, 2))
			*(volatile u32 *)(at & ~3ull) = (u32)odd(cpu);
		else
			*(volatile u64 *)(at & ~7ull) = odd(cpu);
		at += 8;
	}
}

static u16 some_port(struct cpu *cpu)
{
	static const u16 known[] = {0x20, 0x21, 0x40, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xA0, 0xA1, 0xB2, 0x3F8,
				    0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FD, 0x3FE, 0x3FF, 0x2F8, 0x402, 0x510, 0x601, 0xCF8, 0xCFC, 0x4D0};
	return rare(cpu, 4) ? (u16)next(cpu) : known[below(cpu, ARRAY(known))];
}

static void port(struct cpu *cpu)
{
	u16 at = some_port(cpu);
	u64 value = odd(cpu);
	u64 count = below(cpu, 64);
	void *memory = (void *)(ARENA + below(cpu, 0x100000));
	if ((at == 0xCF9 || at == 0x600 || at == 0x64 || at == 0x92) && !rare(cpu, 1024))
		at = 0x80;
	switch (below(cpu, 8)) {
	case 0: out8(at, (u8)value); break;
	case 1: out16(at, (u16)value); break;
	case 2: out32(at, (u32)value); break;
	case 3: in8(at); break;
	case 4: in32(at); break;
	case 5: __asm__ volatile("rep outsb" : "+S"(memory), "+c"(count) : "d"(at) : "memory"); break;
	case 6: __asm__ volatile("rep insl" : "+D"(memory), "+c"(count) : "d"(at) : "memory"); break;
	default: __asm__ volatile("rep insb" : "+D"(memory), "+c"(count) : "d"(at) : "memory"); break;
	}
}

static void mmio(struct cpu *cpu)
{
	static const u64 known[] = {0xFEC00000, 0xFEE00000, 0xFED00000, 0xF8000000, 0xFEB00000, 0xFEC00010, 0xE0000000, 0xFFFFF000};
	u64 at = rare(cpu, 2) ? known[below(cpu, ARRAY(known))] + below(cpu, 0x1000) : 0x40000000 + below(cpu, 0xBFFFFFF0);
	u64 value = odd(cpu);
	/* INIT by the interrupt command register: seldom. */
	if ((at & ~0xFull) == 0xFEE00300 && !rare(cpu, 256))
		at += 0x10;
	switch (below(cpu, 8)) {
	case 0: *(volatile u8 *)at = (u8)value; break;
	case 1: *(volatile u16 *)at = (u16)value; break;
	case 2: *(volatile u32 *)at = (u32)value; break;
	case 3: *(volatile u64 *)at = value; break;
	case 4: (void)*(volatile u8 *)at; break;
	case 5: (void)*(volatile u64 *)at; break;
	case 6: __asm__ volatile("lock xaddq %0, (%1)" : "+r"(value) : "r"(at) : "memory"); break;
	default: (void)*(volatile u32 *)at; break;
	}
}

static void instruction(struct cpu *cpu)
{
	u64 value = odd(cpu);
	u32 words[4];
	switch (below(cpu, 16)) {
	case 0: cpuid(rare(cpu, 2) ? 0x40000000 + (u32)below(cpu, 0x20) : (u32)value, (u32)next(cpu), words); break;
	case 1: __asm__ volatile("ud2"); break;
	case 2: __asm__ volatile("int3"); break;
	case 3: __asm__ volatile("wbinvd"); break;
	case 4: __asm__ volatile("invlpg (%0)" : : "r"(value)); break;
	case 5: __asm__ volatile("xsetbv" : : "c"((u32)below(cpu, 3)), "a"((u32)value), "d"(0)); break;
	case 6: __asm__ volatile("rdpmc" : : "c"((u32)value) : "eax", "edx"); break;
	case 7: __asm__ volatile("mov %0, %%cr8" : : "r"(value & 15)); break;
	case 8: __asm__ volatile("vmmcall" : : "a"(value), "c"(odd(cpu)), "d"(odd(cpu)) : "memory"); break;
	case 9: __asm__ volatile("vmrun" : : "a"(value) : "memory"); break;
	case 10: __asm__ volatile("vmcall" : : "a"(value) : "memory"); break;
	case 11: __asm__ volatile("mov %0, %%dr7" : : "r"(value & 0xFFFF)); break;
	case 12: __asm__ volatile("int $0x50"); break;
	case 13: *(volatile u64 *)(value | 1ull << 40); break;
	case 14:
		/* Sooner or later one of these ends the machine. */
		if (rare(cpu, 4096))
			__asm__ volatile("mov %0, %%cr4" : : "r"(value | 0x20) : "memory");
		break;
	default: __asm__ volatile("pause"); break;
	}
}

/* Interrupts among processors: fixed, NMI, to anybody. */
static void interrupt_command(struct cpu *cpu)
{
	u64 mode = rare(cpu, 512) ? below(cpu, 8) << 8 : rare(cpu, 4) ? 4 << 8 : 0;
	*(volatile u32 *)0xFEE00310 = (u32)below(cpu, 4) << 24;
	*(volatile u32 *)0xFEE00300 = (u32)(mode | 0x4000 | below(cpu, 4) << 18 | below(cpu, 256));
}

static void signal_any(struct cpu *cpu)
{
	signal_channel(cpu);
}

static void (*const steps[])(struct cpu *) = {
	write_msr, write_msr, read_msr, any_hypercall, any_hypercall, any_message, any_message, scribble, scribble,
	port, mmio, instruction, interrupt_command, signal_any, take_messages,
};

static void one(struct cpu *cpu)
{
	/* Spells of good behaviour, so that the bad ones meet something that is worth harming. */
	int good = cpu->effort & 0xC000;
	cpu->effort++;
	if (cpu->index == 0 && (good || rare(cpu, 4)))
		converse(cpu);
	if (!good || cpu->index || rare(cpu, 4096)) {
		cpu->effort += COST;
		steps[below(cpu, ARRAY(steps))](cpu);
	}
}

/* The interrupt chip as it was: random writes switch it off. */
static void repair(struct cpu *cpu)
{
	wrmsr(0x1B, 0xFEE00000 | (cpu->index ? 0 : 0x100));
	wrmsr(0x1B, 0xFEE00800 | (cpu->index ? 0 : 0x100));
	*(volatile u32 *)0xFEE000F0 = 0x1FF;
	*(volatile u32 *)0xFEE00080 = 0;
	__asm__ volatile("mov %0, %%dr7" : : "r"(0x400ull));
	__asm__ volatile("mov %0, %%cr8" : : "r"(0ull));
}

static void wait(u64 cycles)
{
	u64 began = rdtsc();
	for (u64 turns = 0; rdtsc() - began < cycles && turns < 1000000; turns++)
		__asm__ volatile("pause");
}

/* INIT and start-up to the second processor; also when it has come to a halt. */
static void start_second(struct cpu *cpu)
{
	(void)cpu;
	for (u64 at = 0; at < (u64)(trampoline_end - trampoline); at++)
		((volatile u8 *)TRAMPOLINE)[at] = trampoline[at];
	*(volatile u32 *)0xFEE00310 = 1 << 24;
	*(volatile u32 *)0xFEE00300 = 0x4500;
	wait(10000000);
	*(volatile u32 *)0xFEE00310 = 1 << 24;
	*(volatile u32 *)0xFEE00300 = 0x4600 | TRAMPOLINE >> 12;
	wait(1000000);
}

static void report(struct cpu *cpu)
{
	u64 other = processors > 1 ? processor(1)->steps : 0;
	/* Line control as it was: random writes change the port's meaning. */
	out8(COM1 + 3, 3);
	out8(COM1 + 1, 0);
	print_number("\nhostile: seed ", seed);
	print_number(" steps ", cpu->steps);
	print_number("+", other);
	print_number(" faults ", cpu->faults);
	print_number(" interrupts ", cpu->interrupts);
	print_number(" posted ", cpu->posted);
	print_number(" refused ", cpu->refused);
	print_number(" packets ", cpu->packets);
	print_number(" deepest ", deepest);
	print("\n");
}

static void forever(struct cpu *cpu)
{
	u64 seen = 0, before = cpu->effort;
	for (;;) {
		try_call(cpu, one);
		cpu->steps++;
		if (cpu->effort < before || cpu->effort - before < REPORT)
			continue;
		before = cpu->effort;
		try_call(cpu, repair);
		if (cpu->index == 0) {
			try_call(cpu, report);
			if (processors > 1 && processor(1)->steps == seen)
				try_call(cpu, start_second);
			seen = processor(1)->steps;
		}
	}
}

void main_second(void)
{
	struct cpu *cpu = processor(1);
	u64 steps_before = cpu->steps;
	cpu->resume = 0;
	cpu->index = 1;
	cpu->random = (seed + 1 + steps_before) * 0x9E3779B97F4A7C15ull | 1;
	load_idt();
	try_call(cpu, repair);
	try_call(cpu, good_registers);
	forever(cpu);
}

/* --- boot --- */

static u64 option(const char *line, const char *name, u64 otherwise)
{
	for (; *line; line++) {
		const char *a = line, *b = name;
		while (*b && *a == *b)
			a++, b++;
		if (*b)
			continue;
		u64 value = 0;
		while (*a >= '0' && *a <= '9')
			value = value * 10 + (u64)(*a++ - '0');
		return value;
	}
	return otherwise;
}

void main_boot(const u8 *parameters)
{
	struct cpu *cpu = processor(0);
	const char *line = (const char *)(u64) * (const u32 *)(parameters + 0x228);
	volatile u64 *diary = (volatile u64 *)DIARY;
	for (u32 vector = 0; vector < 256; vector++) {
		u64 entry = (u64)entries[vector];
		idt[vector].low = (u16)entry;
		idt[vector].selector = 0x10;
		idt[vector].flags = 0x8E00;
		idt[vector].middle = (u16)(entry >> 16);
		idt[vector].high = (u32)(entry >> 32);
	}
	load_idt();
	seed = option(line, "seed=", 1);
	processors = option(line, "cpus=", 1);
	/* A later boot of the same machine goes another way. */
	if (diary[0] == 0x594F4253434944ull && diary[1] < 1 << 20)
		seed += ++diary[1];
	else
		diary[1] = 0, diary[0] = 0x594F4253434944ull;
	cpu->index = 0;
	cpu->random = seed * 0x9E3779B97F4A7C15ull | 1;
	print_number("\nhostile: seed ", seed);
	print_number(" processors ", processors);
	print("\n");
	try_call(cpu, repair);
	try_call(cpu, good_registers);
	if (processors > 1)
		try_call(cpu, start_second);
	__asm__ volatile("sti");
	forever(cpu);
}
