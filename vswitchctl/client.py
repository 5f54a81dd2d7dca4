"""The synchronous client: every call of the API as a plain method. `AsyncClient` is its asyncio sister.

>>> with Client() as vswitch:                      # doctest: +SKIP
...     vswitch.create_switch("s0")
...     vswitch.create_partition("a")
...     vswitch.create_nic("a/eth0", port="s0/a", addresses=["10.0.0.1/24"])
...     vswitch.start_partition("a")
...     print(vswitch.run_in("a", ["ip", "address"]).stdout.decode())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

import grpc
from google.protobuf.message import Message

from vswitch_api.v1 import capture_pb2, partition_pb2, port_pb2, watch_pb2
from vswitchctl import calls, names, paths, transport
from vswitchctl.aio import AsyncClient, CompletedExec, frame_batches
from vswitchctl.errors import VswitchError, rpc_errors

__all__ = ["AsyncClient", "Client", "CompletedExec", "VswitchError"]

P = ParamSpec("P")
T = TypeVar("T")


class _Method(Generic[P, T]):
    """A call of `vswitchctl.calls` as a method of `Client`."""

    def __init__(self, build: Callable[P, calls.Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, T]:
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            return client.run(self._build(*args, **kwargs))

        return run


class _ListMethod(Generic[P, T]):
    """A paged call of `vswitchctl.calls` as a method of `Client` that gives all items."""

    def __init__(self, build: Callable[P, calls.ListCall[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, list[T]]:
        def run(*args: P.args, **kwargs: P.kwargs) -> list[T]:
            return client.run_list(self._build(*args, **kwargs))

        return run


class Client:
    """A connection to a daemon. Errors of calls are `vswitchctl.errors.VswitchError`.

    `socket` defaults to the one of this user's daemon; `timeout` is the deadline of a call in seconds;
    `on_call` is told every call before it is made. Safe to use from several threads. Use it as a context
    manager, or `close()`.
    """

    def __init__(
        self,
        socket: Path | str | None = None,
        *,
        timeout: float = 30.0,
        on_call: transport.CallObserver | None = None,
    ) -> None:
        self.socket = Path(socket) if socket is not None else paths.socket_path()
        self.timeout = timeout
        self.on_call = on_call
        self.channel = grpc.insecure_channel(
            transport.target_of(self.socket), options=transport.CHANNEL_OPTIONS
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    get_switch = _Method(calls.get_switch)
    list_switches = _ListMethod(calls.list_switches)
    create_switch = _Method(calls.create_switch)
    delete_switch = _Method(calls.delete_switch)
    list_mac_entries = _ListMethod(calls.list_mac_entries)
    list_flows = _ListMethod(calls.list_flows)
    flush_flows = _Method(calls.flush_flows)
    get_port = _Method(calls.get_port)
    list_ports = _ListMethod(calls.list_ports)
    create_port = _Method(calls.create_port)
    create_ports = _Method(calls.create_ports)
    update_port = _Method(calls.update_port)
    delete_port = _Method(calls.delete_port)
    get_nic = _Method(calls.get_nic)
    list_nics = _ListMethod(calls.list_nics)
    create_nic = _Method(calls.create_nic)
    set_nic_link = _Method(calls.set_nic_link)
    delete_nic = _Method(calls.delete_nic)
    get_partition = _Method(calls.get_partition)
    list_partitions = _ListMethod(calls.list_partitions)
    create_partition = _Method(calls.create_partition)
    create_kvm_partition = _Method(calls.create_kvm_partition)
    set_partition_hosts = _Method(calls.set_partition_hosts)
    start_partition = _Method(calls.start_partition)
    stop_partition = _Method(calls.stop_partition)
    sync_partition_time = _Method(calls.sync_partition_time)
    delete_partition = _Method(calls.delete_partition)
    get_extension = _Method(calls.get_extension)
    list_extensions = _ListMethod(calls.list_extensions)
    load_extension = _Method(calls.load_extension)
    update_extension = _Method(calls.update_extension)
    unload_extension = _Method(calls.unload_extension)
    get_capture = _Method(calls.get_capture)
    list_captures = _ListMethod(calls.list_captures)
    stop_capture = _Method(calls.stop_capture)
    trace = _Method(calls.trace)
    get_info = _Method(calls.get_info)
    shutdown = _Method(calls.shutdown)

    def run(self, call: calls.Call[T]) -> T:
        """Runs one call of `vswitchctl.calls`."""
        return call.unpack(self._unary(call.method, call.request, call.response, call.timeout))

    def run_list(self, call: calls.ListCall[T]) -> list[T]:
        """Runs a paged call to its last page."""
        items: list[T] = []
        request: Any = type(call.request)()
        request.CopyFrom(call.request)
        while True:
            response: Any = self._unary(call.method, request, call.response, None)
            items += call.unpack(response)
            if not response.next_page_token:
                return items
            request.page_token = response.next_page_token

    def inject(self, port: str, frames: Iterable[bytes]) -> port_pb2.InjectFramesResponse:
        """Lets frames enter the switch as if the port's NIC had sent them; what `frames` raises is raised."""
        name = names.port(port)
        self._observe("PortService/InjectFrames", port_pb2.InjectFramesRequest(port=name))

        broken: list[Exception] = []

        def requests() -> Iterator[port_pb2.InjectFramesRequest]:
            yield port_pb2.InjectFramesRequest(port=name)
            try:
                for batch in frame_batches(frames):
                    yield port_pb2.InjectFramesRequest(frames=batch)
            except Exception as error:
                # gRPC would swallow it: the stream ends here, and the caller is told below.
                broken.append(error)

        method = self.channel.stream_unary(
            transport.path_of("PortService/InjectFrames"),
            request_serializer=port_pb2.InjectFramesRequest.SerializeToString,
            response_deserializer=port_pb2.InjectFramesResponse.FromString,
        )
        # Without a deadline: frames may come as slowly as they like.
        with rpc_errors(str(self.socket)):
            done = method(requests())
        if broken:
            raise broken[0]
        return done

    def watch(
        self, prefixes: Sequence[str] = (), *, snapshot: bool = True
    ) -> Iterator[watch_pb2.WatchResponse]:
        """What exists, then `synced`, then changes and events as they happen, until the caller stops
        reading.
        """
        request = watch_pb2.WatchRequest(prefixes=prefixes, exclude_snapshot=not snapshot)
        self._observe("WatchService/Watch", request)
        stream: Any = self.channel.unary_stream(
            transport.path_of("WatchService/Watch"),
            request_serializer=watch_pb2.WatchRequest.SerializeToString,
            response_deserializer=watch_pb2.WatchResponse.FromString,
        )(request)
        try:
            with rpc_errors(str(self.socket)):
                yield from stream
        finally:
            stream.cancel()

    @contextmanager
    def capture(
        self,
        *sources: str,
        vmbus: bool = False,
        snap_length: int = 0,
        drops: bool = True,
        packet_limit: int = 0,
    ) -> Iterator[Iterator[capture_pb2.CaptureResponse]]:
        """A running capture of full resource names; it is armed when the block is entered, and ends
        with it.
        """
        request = capture_pb2.CaptureRequest(
            sources=sources,
            vmbus=vmbus,
            snap_length=snap_length,
            exclude_drops=not drops,
            packet_limit=packet_limit,
        )
        self._observe("CaptureService/Capture", request)
        stream: Any = self.channel.unary_stream(
            transport.path_of("CaptureService/Capture"),
            request_serializer=capture_pb2.CaptureRequest.SerializeToString,
            response_deserializer=capture_pb2.CaptureResponse.FromString,
        )(request)

        def responses(first: capture_pb2.CaptureResponse) -> Iterator[capture_pb2.CaptureResponse]:
            yield first
            with rpc_errors(str(self.socket)):
                yield from stream

        try:
            with rpc_errors(str(self.socket)):
                first = next(stream, None)
            if first is None:
                raise VswitchError(grpc.StatusCode.UNKNOWN, "the daemon ended the stream")
            yield responses(first)
        finally:
            stream.cancel()

    def run_in(
        self,
        partition: str,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout: float | None = None,
    ) -> CompletedExec:
        """Runs a command to its end and collects what it wrote; it is killed when `timeout` seconds have
        passed.
        """
        start = partition_pb2.ExecStart(
            partition=names.partition(partition), argv=argv, env=env or {}, cwd=cwd
        )
        first = partition_pb2.ExecRequest(start=start)
        self._observe("PartitionService/Exec", first)

        def requests() -> Iterator[partition_pb2.ExecRequest]:
            yield first
            for offset in range(0, len(stdin), 65536):
                yield partition_pb2.ExecRequest(stdin=stdin[offset : offset + 65536])
            yield partition_pb2.ExecRequest(stdin_end=partition_pb2.StdinEnd())

        output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        end = partition_pb2.ExecExit()
        stream = self.channel.stream_stream(
            transport.path_of("PartitionService/Exec"),
            request_serializer=partition_pb2.ExecRequest.SerializeToString,
            response_deserializer=partition_pb2.ExecResponse.FromString,
        )(requests(), timeout=timeout)
        with rpc_errors(str(self.socket)):
            for response in stream:
                kind = response.WhichOneof("message")
                if kind in ("stdout", "stderr"):
                    output[kind] += getattr(response, kind)
                elif kind == "exit":
                    end = response.exit
        return CompletedExec(
            tuple(argv), end.status, end.signal, end.detail, bytes(output["stdout"]), bytes(output["stderr"])
        )

    def _unary(
        self, method: str, request: Message, response: type[Message], timeout: float | None
    ) -> Message:
        self._observe(method, request)
        invoke: Any = self.channel.unary_unary(
            transport.path_of(method),
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        with rpc_errors(str(self.socket)):
            answer: Message = invoke(request, timeout=max(timeout or 0.0, self.timeout))
        return answer

    def _observe(self, method: str, request: Message) -> None:
        if self.on_call is not None:
            self.on_call(f"{transport.PACKAGE}.{method}", request)
