/* Where things lie, for C and assembly. Memory from ARENA on belongs to nobody: it is what gets scribbled over. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define TRAMPOLINE 0x8000
#define PML4 0x9000
/* Counts boots; nothing writes there but the first instruction of a boot. */
#define DIARY 0x7F0000
#define ARENA 0x800000
#define ARENA_END 0x1800000

#define STACK_SIZE 0x4000
/* struct cpu lies at the low end of each stack. */
#define CPU_RESUME 0

#define PROCESSORS 2

#endif
