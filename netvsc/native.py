"""The native data path behind the surface of `netvsc.datapath`: one worker thread per virtual processor.

The worker takes over its VP's interrupt eventfd and event flags; flags of channels that are not its own come
back to the SynIC's reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from netvsc.datapath import ControlPacket
from netvsc.link import Link
from netvsc.synic import Synic
from netvsc.vmbus import GuestChannel
from vswitch_native import netvsc as native
from vswitch_wire.errors import WireError

__all__ = ["NativeDataPath", "NativeWorkers"]


class NativeDataPath:
    """`vswitch_native.netvsc.DataPath` with control packets as the driver reads them."""

    def __init__(self, inner: native.DataPath) -> None:
        self._inner = inner
        self.control_fd = inner.control_fd
        self._section_size = 0

    def take_control(self) -> list[ControlPacket]:
        return [ControlPacket(*cast(Any, item)) for item in self._inner.take_control()]

    def send_inband(self, payload: bytes, transaction_id: int, completion_requested: bool) -> None:
        self._inner.send_inband(payload, transaction_id, completion_requested)

    def send_completion(self, transaction_id: int, payload: bytes) -> None:
        self._inner.send_completion(transaction_id, payload)

    def send_rndis(self, message: bytes) -> None:
        if len(message) > self._section_size:
            raise WireError(f"RNDIS control message of {len(message)} bytes: no send section takes it")
        self._inner.send_rndis(message)

    def set_receive_buffer(self, pfns: Sequence[int], set_id: int, slot_size: int, slots: int) -> None:
        self._inner.set_receive_buffer(pfns, set_id, slot_size, slots)

    def set_send_buffer(self, pfns: Sequence[int], section_size: int, bounce_pfns: Sequence[int]) -> None:
        self._inner.set_send_buffer(pfns, section_size, bounce_pfns)
        self._section_size = section_size

    def set_aggregation(self, messages: int, alignment: int) -> None:
        self._inner.set_aggregation(messages, alignment)

    def set_offload(self, checksum: bool, mtu: int) -> None:
        self._inner.set_offload(checksum, mtu)

    def set_running(self, running: bool) -> None:
        self._inner.set_running(running)

    def stats(self) -> dict[str, int]:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()


class NativeWorkers:
    """The workers of one connection to the host; `close` before the door's interrupts are replaced."""

    def __init__(self, synic: Synic) -> None:
        self._synic = synic
        self._workers: dict[int, native.Worker] = {}

    def open(self, channel: GuestChannel, link: Link) -> NativeDataPath:
        """A data path for an open channel. WireError."""
        worker = self._workers.get(channel.vp)
        if worker is None:
            interrupt = self._synic.take_interrupt(channel.vp)
            memory = cast(Any, channel.memory)
            worker = native.Worker(memory, interrupt, channel.siefp_gpa, channel.sint)
            self._workers[channel.vp] = worker
            asyncio.get_running_loop().add_reader(worker.stray_fd, self._on_strays, worker)
        inner = worker.open(
            channel.relid,
            channel.ring_pfns,
            channel.downstream_page_offset,
            channel.signal_fd,
            link.fd,
            link.is_packet_socket,
        )
        return NativeDataPath(inner)

    def _on_strays(self, worker: native.Worker) -> None:
        self._synic.dispatch_flags(set(worker.take_strays()))

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers.values():
            asyncio.get_running_loop().remove_reader(worker.stray_fd)
            worker.close()
        self._workers.clear()
