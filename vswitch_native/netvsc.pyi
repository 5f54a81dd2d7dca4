"""Typed surface of the native `netvsc` submodule: the guest end of the data path on threads of its own."""

from collections.abc import Sequence

from vswitch_native.memory import GuestMemory

def transmit(data: bytes, checksum: bool) -> bytes:
    """The RNDIS PACKET message for a frame behind its virtio-net header. WireError."""

def receive(message: bytes, mtu: int) -> bytes:
    """What the interface is given for one PACKET message that is no fragment. WireError."""

class Worker:
    """One virtual processor's thread: owns its interrupt eventfd and event flags, runs its data paths."""

    def __init__(self, memory: GuestMemory, interrupt_fd: int, siefp_gpa: int, sint: int) -> None: ...
    @property
    def stray_fd(self) -> int:
        """Readable while flags of channels without a data path wait."""

    def take_strays(self) -> list[int]: ...
    def open(
        self,
        relid: int,
        ring_pfns: Sequence[int],
        downstream_page_offset: int,
        signal_fd: int,
        link_fd: int,
        packet_socket: bool,
    ) -> DataPath:
        """The descriptors stay the caller's. WireError when the rings cannot be."""

    def close(self) -> None:
        """End the thread; every data path on it is closed."""

class DataPath:
    """One open channel; what each method means is said in `netvsc.datapath.DataPath`."""

    @property
    def control_fd(self) -> int: ...
    def take_control(self) -> list[tuple[str, int, bool, bytes]]:
        """(kind, transaction id, completion requested, payload) each."""

    def send_inband(self, payload: bytes, transaction_id: int, completion_requested: bool) -> None: ...
    def send_completion(self, transaction_id: int, payload: bytes) -> None: ...
    def send_rndis(self, message: bytes) -> None: ...
    def set_receive_buffer(self, pfns: Sequence[int], set_id: int, slot_size: int, slots: int) -> None: ...
    def set_send_buffer(self, pfns: Sequence[int], section_size: int, bounce_pfns: Sequence[int]) -> None: ...
    def set_aggregation(self, messages: int, alignment: int) -> None: ...
    def set_offload(self, checksum: bool, mtu: int) -> None: ...
    def set_running(self, running: bool) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None:
        """Returns when the worker has let go of rings and buffers."""
