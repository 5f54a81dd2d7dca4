/* The bare machine: instructions, console, random numbers, per-processor state. */
#ifndef MACHINE_H
#define MACHINE_H

#include <stddef.h>
#include <stdint.h>

#include "layout.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define COM1 0x3F8
#define COST 64

struct cpu {
	u64 resume; /* CPU_RESUME: the stack to come back to; 0 = nothing is being tried */
	u64 index;
	u64 random;
	volatile u64 steps;
	u64 faults;
	u64 interrupts;
	u64 posted;
	u64 refused;
	u64 packets;
	u64 effort; /* steps, those that leave the guest counted as COST */
};

extern u8 stacks[PROCESSORS][STACK_SIZE];
int try_call(struct cpu *cpu, void (*f)(struct cpu *));

static inline struct cpu *processor(u64 index)
{
	return (struct cpu *)stacks[index];
}

static inline void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out16(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(u16 port, u32 value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 in8(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u32 in32(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void wrmsr(u32 msr, u64 value)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline u64 rdmsr(u32 msr)
{
	u32 low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return low | (u64)high << 32;
}

static inline u64 rdtsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return low | (u64)high << 32;
}

static inline void cpuid(u32 leaf, u32 sub, u32 out[4])
{
	__asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
}

/* xorshift64* */
static inline u64 next(struct cpu *cpu)
{
	u64 x = cpu->random;
	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	cpu->random = x;
	return x * 0x2545F4914F6CDD1Dull;
}

static inline u64 below(struct cpu *cpu, u64 limit)
{
	return (next(cpu) >> 11) % limit;
}

/* True once in `n` times. */
static inline int rare(struct cpu *cpu, u64 n)
{
	return below(cpu, n) == 0;
}

/* A number of the kind that finds mistakes: small, near a power of two, an address, all ones, anything. */
u64 odd(struct cpu *cpu);

void print(const char *text);
void print_number(const char *name, u64 value);

#define ARRAY(x) (sizeof(x) / sizeof((x)[0]))

#endif
