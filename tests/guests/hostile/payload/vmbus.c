/*
 * VMBus (Linux include/linux/hyperv.h), NVSP (drivers/net/hyperv/hyperv_net.h) and RNDIS (MS-RNDIS): contact, offers, GPADLs,
 * an open channel, buffers, packets. Messages are damaged now and then, so that every step is also taken wrongly.
 */
#include "vmbus.h"

/* Steps after which a question is asked again. */
#define AGAIN 4096

enum { LOST, CONTACTED, OFFERED, SHARED, OPENED, READY };

volatile u32 depth, deepest;

static volatile u32 waiting; /* steps since the last progress */
static u32 version;
static u32 relids[8], connections[8];
static u32 offers;
static volatile u32 relid, connection, gpadl, ring_gpadl, receive_gpadl, send_gpadl;
static volatile u32 handshake;
static u32 transactions;
static int amd = -1;

static const u32 versions[] = {0x50003, 0x50002, 0x50001, 0x50000, 0x40001, 0x40000, 0x30000, 0x20004, 0x10001, 0x60000};

static void reached(u32 now)
{
	depth = now;
	waiting = 0;
	if (now > deepest)
		deepest = now;
}

void start_over(void)
{
	depth = LOST;
	offers = 0;
	relid = connection = 0;
	handshake = 0;
	waiting = 0;
}

u32 some_relid(struct cpu *cpu)
{
	if (offers && !rare(cpu, 8))
		return relids[below(cpu, offers > 8 ? 8 : offers)];
	return (u32)odd(cpu);
}

u64 hypercall(u64 control, u64 input, u64 output)
{
	u64 result;
	if (amd < 0) {
		u32 words[4];
		cpuid(0, 0, words);
		/* "Auth", "Hygo" */
		amd = words[1] == 0x68747541 || words[1] == 0x6F677948;
	}
	register u64 r8 __asm__("r8") = output;
	if (amd)
		__asm__ volatile("vmmcall" : "=a"(result), "+c"(control), "+d"(input), "+r"(r8) : : "memory", "r9", "r10", "r11");
	else
		__asm__ volatile("vmcall" : "=a"(result), "+c"(control), "+d"(input), "+r"(r8) : : "memory", "r9", "r10", "r11");
	return result;
}

static void copy(volatile u8 *to, const u8 *from, u32 size)
{
	while (size--)
		*to++ = *from++;
}

u64 post(struct cpu *cpu, u32 to, const u8 *message, u32 size)
{
	volatile u8 *page = (volatile u8 *)(u64)INPUT(cpu->index);
	volatile u32 *head = (volatile u32 *)page;
	head[0] = to;
	head[1] = 0;
	head[2] = 1;
	head[3] = size;
	copy(page + 16, message, size);
	if (rare(cpu, 24)) {
		u64 flips = 1 + below(cpu, 4);
		while (flips--)
			page[below(cpu, rare(cpu, 4) ? 256 : 16 + size)] = (u8)odd(cpu);
	}
	cpu->posted++;
	cpu->effort += COST;
	u64 status = hypercall(CALL_POST_MESSAGE, INPUT(cpu->index), 0);
	if (status & 0xFFFF)
		cpu->refused++;
	return status;
}

static u64 send(struct cpu *cpu, const u32 *words, u32 count)
{
	return post(cpu, version >= 0x50000 ? 4 : 1, (const u8 *)words, count * 4);
}

void good_registers(struct cpu *cpu)
{
	wrmsr(MSR_GUEST_OS_ID, 0x8100000000000000ull | 0x060100);
	wrmsr(MSR_HYPERCALL, HYPERCALL_PAGE | 1);
	wrmsr(MSR_SIMP, SIMP(cpu->index) | 1);
	wrmsr(MSR_SIEFP, SIEFP(cpu->index) | 1);
	wrmsr(MSR_SINT0 + 2, 0x50 | (rare(cpu, 2) ? 1 << 17 : 0));
	wrmsr(MSR_SCONTROL, 1);
}

static void contact(struct cpu *cpu)
{
	version = rare(cpu, 16) ? (u32)odd(cpu) : versions[below(cpu, ARRAY(versions))];
	u32 message[10] = {14, 0, version, (u32)cpu->index};
	/* Below 5.0 an interrupt page, then SINT, VTL and features; then two monitor pages. */
	message[4] = version >= 0x50000 ? 2 : ARENA + 0x7000;
	message[6] = version >= 0x60000 ? 0 : ARENA + 0x8000;
	message[8] = version >= 0x60000 ? 0 : ARENA + 0x9000;
	send(cpu, message, ARRAY(message));
}

/* A GPADL over `pages` pages from `base`, in as many messages as it takes; sometimes over anything. */
static u32 share(struct cpu *cpu, u64 base, u32 pages)
{
	u32 message[60];
	u64 page = base >> 12;
	u32 bytes = 8 + pages * 8, sent = 0;
	u32 id = ++gpadl ? gpadl : ++gpadl;
	u32 now = pages < 26 ? pages : 26;
	message[0] = 8;
	message[1] = 0;
	message[2] = relid;
	message[3] = id;
	message[4] = bytes | 1u << 16;
	message[5] = pages << 12;
	message[6] = 0;
	for (u32 at = 0; at < now; at++) {
		u64 pfn = rare(cpu, 512) ? odd(cpu) : page + at;
		message[7 + at * 2] = (u32)pfn;
		message[8 + at * 2] = (u32)(pfn >> 32);
	}
	send(cpu, message, 7 + now * 2);
	for (sent = now; sent < pages; sent += now) {
		now = pages - sent < 28 ? pages - sent : 28;
		message[0] = 9;
		message[1] = 0;
		message[2] = sent;
		message[3] = id;
		for (u32 at = 0; at < now; at++) {
			message[4 + at * 2] = (u32)(page + sent + at);
			message[5 + at * 2] = 0;
		}
		if (!rare(cpu, 64))
			send(cpu, message, 4 + now * 2);
	}
	return id;
}

static void open_channel(struct cpu *cpu)
{
	u32 message[37] = {5, 0, relid, relid, ring_gpadl, rare(cpu, 8) ? (u32)odd(cpu) : (u32)below(cpu, PROCESSORS)};
	message[6] = rare(cpu, 16) ? (u32)odd(cpu) : RING_PAGES / 2;
	/* Both rings as after a reset. */
	volatile u32 *up = (volatile u32 *)(u64)RINGS;
	volatile u32 *down = (volatile u32 *)(u64)(RINGS + RING_PAGES / 2 * 4096);
	for (u32 at = 0; at < 1024; at++)
		up[at] = down[at] = 0;
	up[16] = down[16] = 1;
	send(cpu, message, ARRAY(message));
}

void signal_channel(struct cpu *cpu)
{
	cpu->effort += COST;
	u64 to = connection && !rare(cpu, 16) ? connection : odd(cpu) & 0xFFFFFF;
	hypercall(CALL_SIGNAL_EVENT | 1 << 16, to, 0);
}

/* One in-band packet into the upper ring. */
static void packet(struct cpu *cpu, const u32 *words, u32 size)
{
	volatile u32 *ring = (volatile u32 *)(u64)RINGS;
	volatile u8 *data = (volatile u8 *)(u64)(RINGS + 4096);
	u32 capacity = (RING_PAGES / 2 - 1) * 4096;
	u32 at = ring[0], was = at;
	u32 length = (16 + size + 7) & ~7u;
	u8 head[16] = {6, 0, 2, 0, (u8)(length / 8), (u8)(length / 8 >> 8), 1, 0};
	if (at >= capacity || at % 8)
		return;
	*(u32 *)(head + 8) = ++transactions;
	if (rare(cpu, 32))
		head[below(cpu, 8)] = (u8)odd(cpu);
	for (u32 i = 0; i < length + 8; i++) {
		u8 byte = 0;
		if (i < 16)
			byte = head[i];
		else if (i < 16 + size)
			byte = ((const u8 *)words)[i - 16];
		else if (i >= length + 4)
			byte = (u8)(was >> (i - length - 4) * 8);
		data[at] = byte;
		at = at + 1 == capacity ? 0 : at + 1;
	}
	__asm__ volatile("" ::: "memory");
	ring[0] = rare(cpu, 64) ? (u32)odd(cpu) : at;
	cpu->packets++;
}

/* RNDIS message `words` by send section 0. */
static void rndis(struct cpu *cpu, u32 kind, const u32 *words, u32 size)
{
	u32 section = rare(cpu, 16) ? (u32)odd(cpu) : (u32)below(cpu, 8);
	u32 message[10] = {107, kind, section, rare(cpu, 16) ? (u32)odd(cpu) : size};
	copy((volatile u8 *)(u64)(SEND_BUFFER + section % 8 * 6144), (const u8 *)words, size);
	packet(cpu, message, 40);
}

static void frame(struct cpu *cpu)
{
	u32 words[64] = {1, 44 + 64, 36, 64};
	u8 *data = (u8 *)(words + 11);
	for (u32 at = 0; at < 64; at++)
		data[at] = (u8)next(cpu);
	/* Broadcasts are for everybody to bear: few of them. */
	if (rare(cpu, 64))
		for (u32 at = 0; at < 6; at++)
			data[at] = 0xFF;
	data[6] = 2;
	if (rare(cpu, 8))
		words[below(cpu, 11)] = (u32)odd(cpu);
	rndis(cpu, 0, words, 44 + 64);
}

/* The next step of the NVSP handshake, in order, then data; any step may be taken twice or wrongly. */
static void nvsp(struct cpu *cpu)
{
	static const u32 nvsp_versions[] = {2, 0x30002, 0x40000, 0x50000, 0x60000, 0x60001};
	u32 init[10] = {1};
	u32 config[10] = {125, 1514, 0, 3};
	u32 ndis[10] = {100, 6, 30};
	u32 receive[10] = {101, receive_gpadl, 0xCAFE};
	u32 sending[10] = {104, send_gpadl, 0xFACE};
	u32 sub[10] = {133, 1, 1};
	u32 any[10] = {below(cpu, 4) ? 100 + (u32)below(cpu, 40) : (u32)odd(cpu)};
	u32 initialise[6] = {2, 24, transactions, 1, 0, 0x4000};
	u32 filter[8] = {5, 32, transactions, 0x1010E, 4, 20, 0, 0xD};
	u32 query[7] = {4, 28, transactions, (u32)odd(cpu), 0, 20, 0};
	u32 step = rare(cpu, 32) ? (u32)below(cpu, 10) : handshake;
	init[1] = init[2] = nvsp_versions[below(cpu, ARRAY(nvsp_versions))];
	for (u32 at = 1; at < 10; at++)
		any[at] = (u32)odd(cpu);
	switch (step) {
	case 0: packet(cpu, init, 40); break;
	case 1: packet(cpu, config, 40); break;
	case 2: packet(cpu, ndis, 40); break;
	case 3: packet(cpu, receive, 40); break;
	case 4: packet(cpu, sending, 40); break;
	case 5: rndis(cpu, 1, initialise, 24); break;
	case 6: rndis(cpu, 1, filter, 32); reached(READY); break;
	case 7: rndis(cpu, 1, query, 28); break;
	case 8: packet(cpu, rare(cpu, 2) ? sub : any, 40); break;
	default: frame(cpu); break;
	}
	if (handshake < 9 || rare(cpu, 512))
		handshake = handshake < 9 ? handshake + 1 : (u32)below(cpu, 9);
	signal_channel(cpu);
	/* What the host sent is taken unread, so that it can go on. */
	volatile u32 *down = (volatile u32 *)(u64)(RINGS + RING_PAGES / 2 * 4096);
	if (!rare(cpu, 16))
		down[1] = down[0];
}

static void on_message(struct cpu *cpu, volatile u32 *words)
{
	u32 released[3] = {13, 0, words[2]};
	switch (words[0]) {
	case 15:
		if (words[2] & 0xFF) {
			u32 request[2] = {3, 0};
			reached(CONTACTED);
			send(cpu, request, 2);
		} else {
			depth = LOST;
		}
		break;
	case 1: {
		u32 at = offers < 8 ? offers++ : (u32)below(cpu, 8);
		/* Child relid at 184; connection id at 192. */
		relids[at] = words[46];
		connections[at] = words[48];
		break;
	}
	case 4:
		if (depth == CONTACTED)
			reached(OFFERED);
		break;
	case 10:
		if (words[4] == 0 && words[3] == ring_gpadl && depth == OFFERED)
			reached(SHARED);
		break;
	case 6:
		if (words[4] == 0 && depth == SHARED) {
			reached(OPENED);
			handshake = 0;
		}
		break;
	case 2:
		if (!rare(cpu, 8))
			send(cpu, released, 3);
		start_over();
		break;
	default:
		break;
	}
}

void take_messages(struct cpu *cpu)
{
	for (u32 sint = 0; sint < 16; sint++) {
		volatile u32 *slot = (volatile u32 *)(u64)(SIMP(cpu->index) + sint * 256);
		if (!slot[0])
			continue;
		if (slot[0] == 1)
			on_message(cpu, slot + 4);
		slot[0] = 0;
		__asm__ volatile("mfence" ::: "memory");
		if (!rare(cpu, 64))
			wrmsr(MSR_EOM, rare(cpu, 16) ? odd(cpu) : 0);
	}
}

static void goodbye(struct cpu *cpu)
{
	u32 unload[2] = {16, 0};
	u32 close[3] = {7, 0, relid};
	u32 teardown[4] = {11, 0, relid, ring_gpadl};
	switch (below(cpu, 4)) {
	case 0: send(cpu, unload, 2); start_over(); break;
	case 1: send(cpu, close, 3); depth = SHARED; break;
	case 2: send(cpu, teardown, 4); break;
	default: contact(cpu); start_over(); break;
	}
}

void converse(struct cpu *cpu)
{
	take_messages(cpu);
	waiting++;
	switch (depth) {
	case LOST:
		if (waiting % AGAIN == 1) {
			good_registers(cpu);
			offers = 0;
			contact(cpu);
		}
		break;
	case OFFERED:
		if (waiting % AGAIN == 1 && offers) {
			u32 at = (u32)below(cpu, offers);
			relid = relids[at];
			connection = connections[at];
			ring_gpadl = share(cpu, RINGS, RING_PAGES);
		}
		break;
	case SHARED:
		if (waiting % AGAIN == 1)
			open_channel(cpu);
		break;
	case OPENED:
		if (waiting == 1)
			receive_gpadl = share(cpu, RECEIVE_BUFFER, RECEIVE_PAGES);
		if (waiting == AGAIN)
			send_gpadl = share(cpu, SEND_BUFFER, SEND_PAGES);
		/* The host takes a while for each. */
		if (waiting > 2 * AGAIN && waiting % (AGAIN / 16) == 0)
			nvsp(cpu);
		break;
	case READY:
		nvsp(cpu);
		if (rare(cpu, 4096))
			goodbye(cpu);
		break;
	}
	if (depth != READY && waiting > 16 * AGAIN) {
		/* Lost on the way: from the beginning. */
		start_over();
	}
}
