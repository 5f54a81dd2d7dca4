"""The Python parsers of guest bytes as fuzz targets: each takes any bytes and asserts the parser's rules.

They take the same inputs as the native targets of the same name and start from the same corpus
(`native/fuzz/corpus`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from hypervisor.integration import icmsg, kvp_messages
from netvsp.handshake import Handshake, ProtocolError
from netvsp.oids import Adapter
from netvsp.rndis_control import RndisControl
from vswitch_wire import door, gpadl, hypercall, ndis, nvsp, packet, rndis, vmbus
from vswitch_wire.errors import UnknownMessage, WireError


def channel_messages(data: bytes) -> None:
    """VMBus channel messages: what decodes packs to bytes that decode to the same."""
    with contextlib.suppress(WireError):
        message = vmbus.decode(data)
        packed = message.pack()
        assert len(packed) <= vmbus.MAXIMUM_MESSAGE_SIZE
        assert vmbus.decode(packed) == message


def gpadls(data: bytes) -> None:
    """A conversation of length-prefixed channel messages: memory stays bounded, results keep the rules."""
    assembler = gpadl.GpadlAssembler(max_in_progress=4)
    position = 0
    while position < len(data):
        length = data[position]
        part = data[position + 1 : position + 1 + length]
        position += 1 + length
        with contextlib.suppress(WireError):
            message = vmbus.decode(part)
            whole = None
            if isinstance(message, vmbus.GpadlHeader):
                whole = assembler.header(message)
            elif isinstance(message, vmbus.GpadlBody):
                whole = assembler.body(message)
            elif isinstance(message, vmbus.RelidReleased):
                assembler.discard_channel(message.relid)
            if whole is not None:
                _check_gpadl(whole)
        assert assembler.in_progress <= 4


def _check_gpadl(whole: gpadl.AssembledGpadl) -> None:
    assert whole.ranges
    assert whole.gpadl_id
    for entry in whole.ranges:
        assert entry.byte_count > 0
        assert entry.byte_offset < 4096
        assert len(entry.pfns) == gpadl.page_count(entry.byte_offset, entry.byte_count)
        assert all(pfn <= gpadl.MAXIMUM_PFN for pfn in entry.pfns)
    assert sum(8 + 8 * len(entry.pfns) for entry in whole.ranges) <= vmbus.MAXIMUM_GPADL_BYTES


class _Buffers:
    """Accepts whatever the handshake asks for."""

    def set_receive_buffer(
        self, pfns: tuple[int, ...], byte_offset: int, byte_count: int, buffer_id: int, size: int, count: int
    ) -> None:
        assert size * count <= byte_count <= len(pfns) * 4096 - byte_offset

    def set_send_buffer(
        self, pfns: tuple[int, ...], byte_offset: int, byte_count: int, section_size: int
    ) -> None:
        assert section_size <= byte_count <= len(pfns) * 4096 - byte_offset

    def revoke_receive_buffer(self) -> None: ...
    def revoke_send_buffer(self) -> None: ...
    def set_mtu(self, mtu: int) -> None: ...


def _buffer(gpadl_id: int) -> gpadl.GpaRange:
    if gpadl_id % 4 == 3:
        raise WireError("no such GPADL")
    pages = 1 + gpadl_id % 600
    return gpadl.GpaRange(pages * 4096, 0, tuple(range(pages)))


def nvsp_messages(data: bytes) -> None:
    """NVSP: decoding as both kinds, then the host's handshake at every version takes the message."""
    for completion in (False, True):
        with contextlib.suppress(WireError):
            message = nvsp.decode(data, completion)
            # A table may lie anywhere: do not build the gap before it.
            if isinstance(message, nvsp.SendIndirectionTable) and message.offset > 65536:
                continue
            assert nvsp.decode(message.pack(40), completion) == message
    for version in (None, *nvsp.NvspVersion):
        adapter = Adapter(bytes(6))
        handshake = Handshake(_Buffers(), _buffer, lambda oid, info, own=adapter: _query(own, oid, info))
        if version is not None:
            handshake.handle(nvsp.Init(version, version).pack(40))
        with contextlib.suppress(ProtocolError):
            for _ in range(2):
                handshake.handle(data)


def _query(adapter: Adapter, oid: int, info: bytes) -> tuple[int, bytes]:
    return RndisControl(adapter, lambda _: None, lambda _: None).query(oid, info)


def rndis_messages(data: bytes) -> None:
    """RNDIS: aggregates, decoding, and the host's control plane, uninitialised and initialised."""
    with contextlib.suppress(WireError):
        total = 0
        for message in rndis.split(data):
            total += len(message)
            with contextlib.suppress(WireError):
                decoded = rndis.decode(message)
                assert rndis.decode(decoded.pack()) == decoded
        assert total <= len(data)
    answers: list[bytes] = []
    control = RndisControl(Adapter(bytes(6), max_queues=4), answers.append, lambda _: None)
    control.handle(data)
    control.handle(rndis.Initialize(1).pack())
    control.handle(data)
    assert len(answers) <= 3
    for answer in answers:
        rndis.decode(answer)
    for parse in _NDIS:
        with contextlib.suppress(WireError):
            parse(data)


_NDIS: tuple[Callable[[bytes], object], ...] = (
    ndis.RssParameters.unpack,
    ndis.OffloadParameters.unpack,
    ndis.ConfigParameter.unpack,
)


def integration_messages(data: bytes) -> None:
    """Answers of a guest's integration drivers: packet, header, a choice of versions, keys and values."""
    with contextlib.suppress(WireError):
        received = packet.decode(data)
        message = icmsg.IcMessage.unpack(received.payload)
        assert icmsg.IcMessage.unpack(message.pack()) == message
        data = message.body
    offered = (icmsg.Version(1, 0), icmsg.Version(3, 0))
    with contextlib.suppress(WireError):
        chosen = icmsg.unpack_negotiation(data, icmsg.FRAMEWORK_VERSIONS, offered)
        assert chosen is None or chosen[1] in offered
    texts: list[str] = []
    with contextlib.suppress(WireError):
        texts.extend(kvp_messages.unpack_enumerate(data))
    with contextlib.suppress(WireError):
        texts.append(kvp_messages.unpack_get(data))
    with contextlib.suppress(WireError):
        # Longer than the fuzzer's inputs.
        info = kvp_messages.unpack_ip_info(data[:7428].ljust(7428, b"\0"))
        texts.extend((*info.addresses, *info.subnets, *info.gateways, *info.dns))
    for text in texts:
        assert len(text) <= 1024
        assert text.replace("\ufffd", "").isprintable()


def door_frames(data: bytes) -> None:
    """Door frames, and what rides in them: hypercall control words, posted messages."""
    with contextlib.suppress(WireError):
        sequence, message = door.decode(data)
        assert door.decode(door.pack(message, sequence)) == (sequence, message)
        if isinstance(message, door.Hypercall):
            with contextlib.suppress(WireError):
                word = hypercall.ControlWord.unpack(message.rcx)
                assert word.pack() == message.rcx
    with contextlib.suppress(WireError):
        post = hypercall.PostMessage.unpack(data)
        assert len(post.payload) <= 240
        assert hypercall.PostMessage.unpack(post.pack()) == post
        with contextlib.suppress(UnknownMessage):
            vmbus.decode(post.payload)
