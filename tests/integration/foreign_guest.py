"""A guest that knows nothing of vswitch but docs/door.md and public descriptions of VMBus, NVSP and RNDIS.

Started with a listening socket in VSWITCH_DOOR_FD, addresses in FOREIGN_ADDRESS and FOREIGN_PEER, it has its
NIC come up, an ARP request and a ping answered by the peer, closes everything and ends with status 0.
"""

import mmap
import os
import socket
import struct

PAGE = 4096
PATIENCE = 30.0  # seconds for the whole run

# docs/door.md, section 4
HELLO, HELLO_ACK, HYPERCALL, RESULT, MSR_WRITE, MSR_RESULT = 0x01, 0x02, 0x10, 0x11, 0x12, 0x14
DELIVER, EOM, EVENTFD, CONFIGURE, CONFIGURED, SHUTDOWN, ERROR = 0x20, 0x21, 0x22, 0x40, 0x41, 0x46, 0x7F

# Pages of this guest, by number within its first memory region.
INPUT, SIMP, SIEFP = 1, 2, 3
RING, RING_PAGES = 16, 8  # per direction
RECEIVE, RECEIVE_PAGES = 64, 64
SEND, SEND_PAGES = 160, 16
SCRATCH = 200

NETVSC_CLASS = bytes.fromhex("635161f83edfc546913ff2d2f965ed0e")
RING_GPADL, RECEIVE_GPADL, SEND_GPADL = 0xE1E10, 0xE1E11, 0xE1E12


class Guest:
    def __init__(self):
        self.deadline = os.times().elapsed + PATIENCE
        listener = socket.socket(fileno=int(os.environ["VSWITCH_DOOR_FD"]))
        self.door, _ = listener.accept()
        self.door.settimeout(0.002)
        self.sequence = self.transaction = 0
        self.results, self.eventfds = {}, {}
        self.messages, self.packets, self.frames = [], [], []
        self.opened = False
        self.message_connection = 4

    def fail(self, text):
        raise SystemExit(f"foreign guest: {text}")

    def send(self, kind, body, sequence=0):
        self.door.send(struct.pack("<HHIII", kind, 0, sequence, len(body), 0) + body)

    def greet(self):
        kind = 0
        while kind != HELLO:
            kind, sequence, body, fds = self.receive()
        low, high, flags, self.partition, vps, regions, _ = struct.unpack_from("<HHIQIIQ", body)
        if not low <= 1 <= high or flags or len(fds) != regions + vps:
            self.fail(f"cannot use HELLO {low}..{high} flags {flags} with {len(fds)} descriptors")
        self.base, size = struct.unpack_from("<QQ", body, 32)
        self.memory = mmap.mmap(fds[0], size)
        self.words = memoryview(self.memory).cast("I")
        self.interrupt = fds[regions]
        self.send(HELLO_ACK, struct.pack("<HHI", 1, 0, 0), sequence)

    def receive(self):
        """One frame, or (0, ...) after 2 ms without any."""
        if os.times().elapsed > self.deadline:
            self.fail("out of patience")
        try:
            data, fds, _, _ = socket.recv_fds(self.door, 65536, 80)
        except TimeoutError:
            return 0, 0, b"", []
        if not data:
            self.fail("the host closed the door")
        kind, _, sequence, length, _ = struct.unpack_from("<HHIII", data)
        if length != len(data) - 16:
            self.fail("a frame with a wrong length")
        return kind, sequence, data[16:], fds

    def turn(self):
        """Serve one frame from the host, and the ring."""
        kind, sequence, body, fds = self.receive()
        if kind in (RESULT, MSR_RESULT):
            self.results[sequence] = body
        elif kind == DELIVER:
            self.deliver(body)
        elif kind == EVENTFD:
            connection, add = struct.unpack("<II", body)
            if add:
                self.eventfds[connection] = fds[0]
            else:
                os.close(self.eventfds.pop(connection))
        elif kind == CONFIGURE:
            self.send(CONFIGURED, struct.pack("<I", 95), sequence)
        elif kind in (SHUTDOWN, ERROR):
            self.fail(f"the host ends it: {body[4:].decode()}")
        if self.opened:
            try:
                os.read(self.interrupt, 8)
                self.put(SIEFP * PAGE + 2 * 256, bytes(256))
            except BlockingIOError:
                pass
            self.read_ring()

    def wait(self, condition, what):
        while not condition():
            if os.times().elapsed > self.deadline:
                self.fail(f"no {what}")
            self.turn()

    def take(self, source, fits, what):
        """Wait for an element of the list that fits, and take it out."""
        self.wait(lambda: any(map(fits, source)), what)
        found = next(filter(fits, source))
        source.remove(found)
        return found

    def ask(self, kind, body):
        self.sequence += 1
        sequence = self.sequence
        self.send(kind, body, sequence)
        self.wait(lambda: sequence in self.results, f"answer to request {kind:#x}")
        return self.results.pop(sequence)

    def write_msr(self, msr, value):
        (status,) = struct.unpack_from("<I", self.ask(MSR_WRITE, struct.pack("<IIQ", 0, msr, value)))
        if status:
            self.fail(f"writing MSR {msr:#x} raises #GP")

    def gpa(self, page):
        return self.base + page * PAGE

    def pfn(self, page):
        return self.gpa(page) >> 12

    def put(self, offset, data):
        self.memory[offset : offset + len(data)] = data

    def get(self, offset, length):
        return self.memory[offset : offset + length]

    # --- messages (TLFS, Inter-Partition Communication) ---

    def start_synic(self):
        self.write_msr(0x40000000, 1 << 63 | 0x7E << 56)
        self.write_msr(0x40000083, self.gpa(SIMP) | 1)
        self.write_msr(0x40000082, self.gpa(SIEFP) | 1)
        self.write_msr(0x40000092, 0x40)
        self.write_msr(0x40000080, 1)

    def deliver(self, body):
        vp, sint = struct.unpack_from("<II", body)
        slot = SIMP * PAGE + sint * 256
        if self.words[slot // 4]:
            self.fail("a message for a slot that is in use")
        self.put(slot + 4, body[12:])
        self.words[slot // 4] = struct.unpack_from("<I", body, 8)[0]
        # From here on as a driver: read the slot, empty it, end the message.
        kind, size = struct.unpack_from("<IB", self.get(slot, 8))
        payload = self.get(slot + 16, size)
        self.words[slot // 4] = 0
        self.send(EOM, struct.pack("<II", vp, sint))
        self.messages += [payload] if kind == 1 else []

    def post(self, payload):
        block = struct.pack("<IIII", self.message_connection, 0, 1, len(payload)) + payload
        for _ in range(1000):
            self.put(INPUT * PAGE, block.ljust(256, b"\0"))
            body = struct.pack("<II3Q96x", 0, 0, 0x5C, self.gpa(INPUT), 0)
            status = struct.unpack_from("<Q", self.ask(HYPERCALL, body))[0] & 0xFFFF
            if status != 0x13:  # INSUFFICIENT_BUFFERS: once more
                break
        if status:
            self.fail(f"HvCallPostMessage: status {status:#x}")

    def message(self, number):
        """The next channel message of this type."""
        head = struct.pack("<I", number)
        return self.take(self.messages, lambda entry: entry[:4] == head, f"channel message {number}")

    # --- VMBus (include/linux/hyperv.h) ---

    def contact(self):
        version = 0x00050003
        self.post(struct.pack("<IIIIBBHIQQ", 14, 0, version, 0, 2, 0, 0, 0, 0, 0))
        supported, state, connection = struct.unpack_from("<BBxxI", self.message(15), 8)
        if not supported or state:
            self.fail(f"VMBus 5.3 refused: {supported} {state}")
        self.message_connection = connection
        self.post(struct.pack("<II", 3, 0))
        self.message(4)
        offer = self.take(self.messages, lambda m: m[0] == 1 and m[8:24] == NETVSC_CLASS, "offer of a NIC")
        self.relid, self.connection = struct.unpack_from("<I4xI", offer, 184)

    def gpadl(self, number, page, count):
        pfns = struct.pack(f"<{count}Q", *(self.pfn(page + index) for index in range(count)))
        ranges = struct.pack("<II", count * PAGE, 0) + pfns
        head = struct.pack("<IIIIHH", 8, 0, self.relid, number, len(ranges), 1)
        self.post(head + ranges[: 8 + 26 * 8])
        for start in range(8 + 26 * 8, len(ranges), 28 * 8):
            self.post(struct.pack("<IIII", 9, 0, 0, number) + ranges[start : start + 28 * 8])
        if struct.unpack_from("<III", self.message(10), 8) != (self.relid, number, 0):
            self.fail(f"GPADL {number:#x} refused")

    def open(self):
        self.gpadl(RING_GPADL, RING, 2 * RING_PAGES)
        self.post(struct.pack("<IIIIIII120x", 5, 0, self.relid, self.relid, RING_GPADL, 0, RING_PAGES))
        if struct.unpack_from("<III", self.message(6), 8) != (self.relid, self.relid, 0):
            self.fail("OPENCHANNEL refused")
        self.up, self.down = RING * PAGE, (RING + RING_PAGES) * PAGE
        self.ring_size = (RING_PAGES - 1) * PAGE
        self.words[self.up // 4 + 16] = 1
        self.opened = True

    def close(self):
        self.opened = False
        self.post(struct.pack("<III", 7, 0, self.relid))
        for number in (RING_GPADL, RECEIVE_GPADL, SEND_GPADL):
            self.post(struct.pack("<IIII", 11, 0, self.relid, number))
            if self.message(12)[8:12] != struct.pack("<I", number):
                self.fail("another GPADL was torn down")
        self.post(struct.pack("<II", 16, 0))
        self.message(17)

    def copy_in(self, ring, index, data):
        first = min(len(data), self.ring_size - index)
        self.put(ring + PAGE + index, data[:first])
        self.put(ring + PAGE, data[first:])

    def copy_out(self, ring, index, length):
        first = min(length, self.ring_size - index)
        return self.get(ring + PAGE + index, first) + self.get(ring + PAGE, length - first)

    def write_packet(self, kind, extra, payload, transaction, ask):
        payload += bytes(-len(payload) % 8)
        length = 16 + len(extra) + len(payload)
        head = struct.pack("<HHHHQ", kind, (16 + len(extra)) // 8, length // 8, int(ask), transaction)
        write = self.words[self.up // 4]
        used = (write - self.words[self.up // 4 + 1]) % self.ring_size
        if self.ring_size - used <= length + 8:
            self.fail("the ring is full")
        self.copy_in(self.up, write, head + extra + payload + struct.pack("<II", 0, write))
        self.words[self.up // 4] = (write + length + 8) % self.ring_size
        os.write(self.eventfds[self.connection], struct.pack("<Q", 1))

    def read_ring(self):
        read, write = self.words[self.down // 4 + 1], self.words[self.down // 4]
        while read != write:
            kind, offset8, length8, _, transaction = struct.unpack(
                "<HHHHQ", self.copy_out(self.down, read, 16)
            )
            raw = self.copy_out(self.down, read, length8 * 8)
            read = (read + length8 * 8 + 8) % self.ring_size
            self.words[self.down // 4 + 1] = read
            if kind == 7:
                self.received(raw, transaction)
            else:
                self.packets.append((kind, transaction, raw[offset8 * 8 :]))
        if self.words[self.down // 4 + 3]:  # the host waits for space
            os.write(self.eventfds[self.connection], struct.pack("<Q", 1))

    def received(self, raw, transaction):
        page_set, count = struct.unpack_from("<H2xI", raw, 16)
        if page_set != 0xCAFE:
            self.fail("a transfer page set that is not the receive buffer")
        for index in range(count):
            length, offset = struct.unpack_from("<II", raw, 24 + index * 8)
            if offset + length > RECEIVE_PAGES * PAGE:
                self.fail("a range outside the receive buffer")
            self.frames.append(self.get(RECEIVE * PAGE + offset, length))
        self.write_packet(0xB, b"", struct.pack("<II", 108, 1), transaction, False)

    def nvsp(self, body, ask):
        self.transaction += 1
        transaction = self.transaction
        self.write_packet(6, b"", body.ljust(40, b"\0"), transaction, ask)
        return self.completion(transaction) if ask else b""

    def completion(self, transaction):
        fits = (0xB, transaction)
        return self.take(self.packets, lambda entry: entry[:2] == fits, "completion")[2]

    def start_nvsp(self):
        number, status = struct.unpack_from(
            "<I8xI", self.nvsp(struct.pack("<III", 1, 0x50000, 0x50000), True)
        )
        if (number, status) != (2, 1):
            self.fail(f"NVSP 5 refused: {number} {status}")
        self.nvsp(struct.pack("<IIIQ", 125, 1514, 0, 0), False)
        self.nvsp(struct.pack("<III", 100, 6, 30), False)
        self.gpadl(RECEIVE_GPADL, RECEIVE, RECEIVE_PAGES)
        answer = self.nvsp(struct.pack("<IIH", 101, RECEIVE_GPADL, 0xCAFE), True)
        number, status, sections, offset, size, count = struct.unpack_from("<IIIIII", answer)
        if (number, status, sections, offset) != (102, 1, 1, 0) or size * count > RECEIVE_PAGES * PAGE:
            self.fail("the receive buffer was refused or carved wrongly")
        self.gpadl(SEND_GPADL, SEND, SEND_PAGES)
        answer = self.nvsp(struct.pack("<IIH", 104, SEND_GPADL, 0), True)
        number, status, self.section_size = struct.unpack_from("<III", answer)
        if (number, status) != (105, 1) or self.section_size > SEND_PAGES * PAGE:
            self.fail("the send buffer was refused")

    def send_rndis(self, message, control, direct=False):
        """Through section 0 of the send buffer, or by pages of our own."""
        self.transaction += 1
        transaction = self.transaction
        if direct:
            self.put(SCRATCH * PAGE + 100, message)
            extra = struct.pack("<IIIIQ", 0, 1, len(message), 100, self.pfn(SCRATCH))
            body = struct.pack("<IIII", 107, int(control), 0xFFFFFFFF, 0)
            self.write_packet(9, extra, body, transaction, True)
        else:
            self.put(SEND * PAGE, message)
            body = struct.pack("<IIII", 107, int(control), 0, len(message))
            self.write_packet(6, b"", body, transaction, True)
        if struct.unpack_from("<II", self.completion(transaction)) != (108, 1):
            self.fail("the host found fault with an RNDIS message")

    # --- RNDIS (MS-RNDIS) ---

    def request(self, kind, body):
        self.transaction += 1
        rid = self.transaction
        self.send_rndis(struct.pack("<III", kind, 12 + len(body), rid) + body, True)
        head = (kind | 1 << 31, rid)
        what = f"answer to RNDIS message {kind}"
        answer = self.take(self.frames, lambda entry: struct.unpack_from("<I4xI", entry) == head, what)
        if struct.unpack_from("<I", answer, 12)[0]:
            self.fail(f"RNDIS message {kind}: status {struct.unpack_from('<I', answer, 12)[0]:#x}")
        return answer

    def query(self, oid):
        answer = self.request(4, struct.pack("<IIII", oid, 0, 20, 0))
        length, offset = struct.unpack_from("<II", answer, 16)
        return answer[8 + offset : 8 + offset + length]

    def set(self, oid, value):
        self.request(5, struct.pack("<IIII", oid, len(value), 20, 0) + value)

    def start_rndis(self):
        self.request(2, struct.pack("<III", 1, 0, 0x4000))
        self.mac = self.query(0x01010101)
        if len(self.mac) != 6 or struct.unpack("<I", self.query(0x00010106))[0] != 1500:
            self.fail("no usable address or frame size")
        if struct.unpack("<I", self.query(0x00010114))[0]:
            self.fail("the medium is not connected")
        self.set(0x0001010E, struct.pack("<I", 0x0D))

    def transmit(self, frame, direct):
        head = struct.pack("<IIIIIIIIIII", 1, 44 + len(frame), 36, len(frame), 0, 0, 0, 0, 0, 0, 0)
        self.send_rndis(head + frame, False, direct)

    @staticmethod
    def ethernet(message):
        """The frame in an RNDIS PACKET, nothing in any other message."""
        kind, offset, length = struct.unpack_from("<I4xII", message)
        return message[8 + offset : 8 + offset + length] if kind == 1 else b""

    def answer(self, fits, what):
        """The first Ethernet frame that fits."""
        return self.ethernet(self.take(self.frames, lambda entry: fits(self.ethernet(entry)), what))

    def ping(self):
        mine, peer = (
            socket.inet_aton(os.environ["FOREIGN_ADDRESS"]),
            socket.inet_aton(os.environ["FOREIGN_PEER"]),
        )
        request = b"\xff" * 6 + self.mac + struct.pack("!HHHBBH", 0x806, 1, 0x800, 6, 4, 1) + self.mac + mine
        self.transmit((request + bytes(6) + peer).ljust(60, b"\0"), False)
        reply = self.answer(
            lambda f: f[12:14] == b"\x08\x06" and f[20:22] == b"\0\2" and f[28:32] == peer, "ARP reply"
        )
        peer_mac = reply[22:28]
        print(f"arp: {os.environ['FOREIGN_PEER']} is at {peer_mac.hex(':')}", flush=True)
        echo = struct.pack("!BBHHH", 8, 0, 0, 0x4656, 1) + b"written by a stranger"
        echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(echo), 1, 0, 64, 1, 0) + mine + peer
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        self.transmit(peer_mac + self.mac + b"\x08\0" + head + echo, True)
        reply = self.answer(lambda f: f[12:14] == b"\x08\0" and f[23] == 1 and f[26:30] == peer, "ping reply")
        size = struct.unpack_from("!H", reply, 16)[0]
        if reply[34:36] != b"\0\0" or reply[38 : 14 + size] != echo[4:] or checksum(reply[34 : 14 + size]):
            self.fail("the ping came back changed")
        print(f"ping: answered, {size} bytes", flush=True)


def checksum(data):
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


guest = Guest()
guest.greet()
guest.start_synic()
guest.contact()
guest.open()
guest.start_nvsp()
guest.start_rndis()
guest.ping()
guest.close()
print("closed", flush=True)
