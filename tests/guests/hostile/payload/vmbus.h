/* A guest's side of VMBus and NVSP, just good enough to get deep before it turns bad. */
#ifndef VMBUS_H
#define VMBUS_H

#include "machine.h"

/* Below ARENA_END, so that scribbling reaches all of it. */
#define HYPERCALL_PAGE ARENA
#define SIMP(cpu) (ARENA + 0x1000 + (cpu) * 0x1000)
#define SIEFP(cpu) (ARENA + 0x3000 + (cpu) * 0x1000)
#define INPUT(cpu) (ARENA + 0x5000 + (cpu) * 0x1000)
#define RINGS (ARENA + 0x10000)
#define RING_PAGES 16
#define RECEIVE_BUFFER (ARENA + 0x100000)
#define RECEIVE_PAGES 64
#define SEND_BUFFER (ARENA + 0x180000)
#define SEND_PAGES 16

#define MSR_GUEST_OS_ID 0x40000000
#define MSR_HYPERCALL 0x40000001
#define MSR_SCONTROL 0x40000080
#define MSR_SIEFP 0x40000082
#define MSR_SIMP 0x40000083
#define MSR_EOM 0x40000084
#define MSR_SINT0 0x40000090

#define CALL_POST_MESSAGE 0x5C
#define CALL_SIGNAL_EVENT 0x5D

u64 hypercall(u64 control, u64 input, u64 output);
/* Posts `size` bytes, sometimes damaged; the status. */
u64 post(struct cpu *cpu, u32 connection, const u8 *message, u32 size);
void signal_channel(struct cpu *cpu);
/* Registers as a good guest sets them. */
void good_registers(struct cpu *cpu);
/* Takes what lies in the message slots, as a good guest does. */
void take_messages(struct cpu *cpu);
/* The next step of a conversation that ends with packets in a ring. */
void converse(struct cpu *cpu);
/* Forgets the conversation. */
void start_over(void);
/* Where the conversation stands, 0..5, and the deepest it ever got. */
extern volatile u32 depth, deepest;
/* A relid or connection id that the host knows, or nearly. */
u32 some_relid(struct cpu *cpu);

#endif
