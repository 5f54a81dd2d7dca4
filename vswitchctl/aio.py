"""The asyncio client: every call of the API as an awaitable method, every stream as an asynchronous
object.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from vswitch_api.v1 import (
    capture_pb2,
    partition_pb2,
    port_pb2,
    watch_pb2,
)
from vswitchctl import calls, names, paths, transport
from vswitchctl.errors import rpc_errors

P = ParamSpec("P")
T = TypeVar("T")

FRAMES_PER_MESSAGE = 256


class _Method(Generic[P, T]):
    """A call of `vswitchctl.calls` as a method of `AsyncClient`."""

    def __init__(self, build: Callable[P, calls.Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __get__(self, client: AsyncClient, owner: type[AsyncClient]) -> Callable[P, Awaitable[T]]:
        def run(*args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
            return client.run(self._build(*args, **kwargs))

        return run


class _ListMethod(Generic[P, T]):
    """A paged call of `vswitchctl.calls` as a method of `AsyncClient` that gives all items."""

    def __init__(self, build: Callable[P, calls.ListCall[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __get__(self, client: AsyncClient, owner: type[AsyncClient]) -> Callable[P, Awaitable[list[T]]]:
        def run(*args: P.args, **kwargs: P.kwargs) -> Awaitable[list[T]]:
            return client.run_list(self._build(*args, **kwargs))

        return run


class AsyncClient:
    """A connection to a daemon. Errors of calls are `vswitchctl.errors.VswitchError`.

    `socket` defaults to the one of this user's daemon; `timeout` is the deadline of a call in seconds;
    `on_call` is told every call before it is made. Use it as an asynchronous context manager, or `await
    close()`.
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
        self.channel = grpc.aio.insecure_channel(
            transport.target_of(self.socket), options=transport.CHANNEL_OPTIONS
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

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

    async def run(self, call: calls.Call[T]) -> T:
        """Runs one call of `vswitchctl.calls`."""
        response = await self._unary(call.method, call.request, call.response, call.timeout)
        return call.unpack(response)

    async def run_list(self, call: calls.ListCall[T]) -> list[T]:
        """Runs a paged call to its last page."""
        items: list[T] = []
        request: Any = type(call.request)()
        request.CopyFrom(call.request)
        while True:
            response: Any = await self._unary(call.method, request, call.response, None)
            items += call.unpack(response)
            if not response.next_page_token:
                return items
            request.page_token = response.next_page_token

    async def inject(self, port: str, frames: Iterable[bytes]) -> port_pb2.InjectFramesResponse:
        """Lets frames enter the switch as if the port's NIC had sent them; what `frames` raises is raised."""
        name = names.port(port)
        self._observe("PortService/InjectFrames", port_pb2.InjectFramesRequest(port=name))

        broken: list[Exception] = []

        def requests() -> Iterable[port_pb2.InjectFramesRequest]:
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
            done = await method(iter(requests()))
        if broken:
            raise broken[0]
        return done

    async def watch(
        self, prefixes: Sequence[str] = (), *, snapshot: bool = True
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        """What exists, then `synced`, then changes and events as they happen, until the caller stops
        reading.
        """
        request = watch_pb2.WatchRequest(prefixes=prefixes, exclude_snapshot=not snapshot)
        self._observe("WatchService/Watch", request)
        stream = self.channel.unary_stream(
            transport.path_of("WatchService/Watch"),
            request_serializer=watch_pb2.WatchRequest.SerializeToString,
            response_deserializer=watch_pb2.WatchResponse.FromString,
        )(request)
        try:
            with rpc_errors(str(self.socket)):
                async for response in stream:
                    yield response
        finally:
            stream.cancel()

    @asynccontextmanager
    async def capture(
        self,
        *sources: str,
        vmbus: bool = False,
        snap_length: int = 0,
        drops: bool = True,
        packet_limit: int = 0,
    ) -> AsyncIterator[CaptureStream]:
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
        stream = self.channel.unary_stream(
            transport.path_of("CaptureService/Capture"),
            request_serializer=capture_pb2.CaptureRequest.SerializeToString,
            response_deserializer=capture_pb2.CaptureResponse.FromString,
        )(request)
        try:
            responses = aiter(stream)
            with rpc_errors(str(self.socket)):
                first = await anext(responses, None)
                if first is None:
                    await _raise_status(stream)
            yield CaptureStream(first, responses, str(self.socket))
        finally:
            stream.cancel()

    @asynccontextmanager
    async def exec(
        self,
        partition: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        terminal: tuple[int, int] | None = None,
    ) -> AsyncIterator[ExecStream]:
        """A command running in a partition; leaving the block before its end kills it. `terminal`: (rows,
        columns).
        """
        size = partition_pb2.TerminalSize(rows=terminal[0], columns=terminal[1]) if terminal else None
        start = partition_pb2.ExecStart(
            partition=names.partition(partition), argv=argv, env=env or {}, cwd=cwd, terminal=size
        )
        request = partition_pb2.ExecRequest(start=start)
        method = "PartitionService/Exec"
        async with self._stream(method, request, partition_pb2.ExecResponse) as (stream, first):
            yield ExecStream(stream, first, str(self.socket))

    @asynccontextmanager
    async def console(self, partition: str, *, take_over: bool = False) -> AsyncIterator[ConsoleStream]:
        """A virtual machine's serial console; leaving the block leaves it. `take_over`: end another
        caller's.
        """
        opening = partition_pb2.ConsoleOpen(partition=names.partition(partition), take_over=take_over)
        request = partition_pb2.ConsoleRequest(open=opening)
        method = "PartitionService/Console"
        async with self._stream(method, request, partition_pb2.ConsoleResponse) as (stream, _):
            yield ConsoleStream(stream, str(self.socket))

    async def run_in(
        self,
        partition: str,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout: float | None = None,  # noqa: ASYNC109 - the same argument as the synchronous client
    ) -> CompletedExec:
        """Runs a command to its end and collects what it wrote; TimeoutError (the command is killed) after
        `timeout` s.
        """
        output: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        async with asyncio.timeout(timeout), self.exec(partition, argv, env=env, cwd=cwd) as command:
            # Beside the reading: a command that answers while it reads would wait for us, and we for it.
            feeding = asyncio.ensure_future(_feed(command, stdin))
            try:
                async for response in command:
                    kind = response.WhichOneof("message")
                    if kind in ("stdout", "stderr"):
                        output[kind] += getattr(response, kind)
            finally:
                feeding.cancel()
                # What failed it has ended the output as well, which was told.
                await asyncio.gather(feeding, return_exceptions=True)
        assert command.exit is not None
        return CompletedExec(
            tuple(argv),
            command.exit.status,
            command.exit.signal,
            command.exit.detail,
            bytes(output["stdout"]),
            bytes(output["stderr"]),
        )

    @asynccontextmanager
    async def port_io(self, port: str, *, monitor: bool = False) -> AsyncIterator[PortSocket]:
        """A socket on a port: as its NIC, or with `monitor` beside the NIC that is there."""
        mode = port_pb2.PORT_IO_MODE_MONITOR if monitor else port_pb2.PORT_IO_MODE_ENDPOINT
        request = port_pb2.PortIoRequest(open=port_pb2.PortIoOpen(port=names.port(port), mode=mode))
        async with self._stream("PortService/PortIo", request, port_pb2.PortIoResponse) as (stream, _):
            yield PortSocket(stream, str(self.socket))

    @asynccontextmanager
    async def _stream(
        self, method: str, request: Message, response: type[Message]
    ) -> AsyncIterator[tuple[Any, Any]]:
        """A stream in both directions that was opened with `request`, and its first answer; leaving the
        block ends it.
        """
        self._observe(method, request)
        stream: Any = self.channel.stream_stream(
            transport.path_of(method),
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )()
        try:
            with rpc_errors(str(self.socket)):
                await _write(stream, request)
                first = await stream.read()
                if first is grpc.aio.EOF:
                    await _raise_status(stream)
            yield stream, first
        finally:
            stream.cancel()

    async def _unary(
        self, method: str, request: Message, response: type[Message], seconds: float | None
    ) -> Message:
        self._observe(method, request)
        invoke: Any = self.channel.unary_unary(
            transport.path_of(method),
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        with rpc_errors(str(self.socket)):
            answer: Message = await invoke(request, timeout=max(seconds or 0.0, self.timeout))
        return answer

    def _observe(self, method: str, request: Message) -> None:
        if self.on_call is not None:
            self.on_call(f"{transport.PACKAGE}.{method}", request)


async def _feed(command: ExecStream, stdin: bytes) -> None:
    for offset in range(0, len(stdin), 65536):
        await command.write(stdin[offset : offset + 65536])
    await command.close_stdin()


async def _write(stream: Any, request: Message) -> None:
    try:
        await stream.write(request)
    except asyncio.InvalidStateError:
        # Of a stream that is over; how it ended says more.
        if not stream.done():
            raise
        await _raise_status(stream)


async def _raise_status(stream: Any) -> NoReturn:
    """Raises how the server ended `stream`; a good end while more was due is an error of the server."""
    code = await stream.code()
    raise grpc.aio.AioRpcError(
        code if code != grpc.StatusCode.OK else grpc.StatusCode.UNKNOWN,
        await stream.initial_metadata(),
        await stream.trailing_metadata(),
        await stream.details() or "the daemon ended the stream",
    )


@dataclass(frozen=True)
class CompletedExec:
    """A command that has ended: `status` when by itself, else `signal`; `detail` says why it could
    not run.
    """

    argv: tuple[str, ...]
    status: int
    signal: int
    detail: str
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        return self.status == 0 and self.signal == 0 and not self.detail


class CaptureStream:
    """The pieces of one pcapng file; `capture` holds its name and, at the end, its counts."""

    def __init__(
        self,
        first: capture_pb2.CaptureResponse,
        responses: AsyncIterator[capture_pb2.CaptureResponse],
        target: str,
    ) -> None:
        self.capture = first.capture
        self._first = first.pcapng
        self._responses = responses
        self._target = target

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._first
        with rpc_errors(self._target):
            async for response in self._responses:
                if response.HasField("capture"):
                    self.capture = response.capture
                if response.pcapng:
                    yield response.pcapng


class ExecStream:
    """A running command. Iterate over it for its output; `exit` is set when that ends."""

    def __init__(self, stream: Any, first: partition_pb2.ExecResponse, target: str) -> None:
        self._stream = stream
        self._first = first
        self._target = target
        self.exit: partition_pb2.ExecExit | None = None

    async def write(self, data: bytes) -> None:
        """To the command's standard input, at most 64 KiB at once; nothing when the command has ended."""
        await self._send(partition_pb2.ExecRequest(stdin=data))

    async def close_stdin(self) -> None:
        await self._send(partition_pb2.ExecRequest(stdin_end=partition_pb2.StdinEnd()))

    async def resize(self, rows: int, columns: int) -> None:
        await self._send(
            partition_pb2.ExecRequest(resize=partition_pb2.TerminalSize(rows=rows, columns=columns))
        )

    async def send_signal(self, number: int) -> None:
        await self._send(partition_pb2.ExecRequest(signal=number))

    async def _send(self, request: partition_pb2.ExecRequest) -> None:
        # A command may end at any time; what is written to it afterwards has nowhere to go.
        with rpc_errors(self._target), contextlib.suppress(asyncio.InvalidStateError):
            await self._stream.write(request)

    async def __aiter__(self) -> AsyncIterator[partition_pb2.ExecResponse]:
        response: Any = self._first
        while response is not grpc.aio.EOF:
            if response.WhichOneof("message") == "exit":
                self.exit = response.exit
                # The daemon ends the stream when this side has: nothing is written to a stream that is gone.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await self._stream.done_writing()
            yield response
            with rpc_errors(self._target):
                response = await self._stream.read()
        if self.exit is None:
            with rpc_errors(self._target):
                await _raise_status(self._stream)


class ConsoleStream:
    """A serial console. Iterate over it for its output; `detail` says why it ended."""

    def __init__(self, stream: Any, target: str) -> None:
        self._stream = stream
        self._target = target
        self.detail = ""

    async def write(self, data: bytes) -> None:
        """Keys, at most 64 KiB at once; nothing when the console has ended."""
        with rpc_errors(self._target), contextlib.suppress(asyncio.InvalidStateError):
            await self._stream.write(partition_pb2.ConsoleRequest(input=data))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with rpc_errors(self._target):
            while (response := await self._stream.read()) is not grpc.aio.EOF:
                if response.WhichOneof("message") == "end":
                    self.detail = response.end.detail
                    return
                yield response.output
            await _raise_status(self._stream)


class PortSocket:
    """Frames in and out of a port."""

    def __init__(self, stream: Any, target: str) -> None:
        self._stream = stream
        self._target = target
        self._frames: list[bytes] = []

    async def send(self, *frames: bytes) -> None:
        for batch in frame_batches(frames):
            request = port_pb2.PortIoRequest(frames=port_pb2.PortIoFrames(frames=batch))
            with rpc_errors(self._target):
                await _write(self._stream, request)

    async def receive(self) -> bytes:
        """The next frame; EOFError when the daemon ended the stream."""
        while not self._frames:
            with rpc_errors(self._target):
                response = await self._stream.read()
                ended = response is grpc.aio.EOF
                if ended and await self._stream.code() != grpc.StatusCode.OK:
                    await _raise_status(self._stream)
            if ended:
                raise EOFError("the port's stream has ended")
            self._frames = [frame.data for frame in reversed(response.frames.frames)]
        return self._frames.pop()


def frame_batches(frames: Iterable[bytes]) -> Iterable[list[port_pb2.Frame]]:
    """Frames in lists of as many as one message takes."""
    batch: list[port_pb2.Frame] = []
    for frame in frames:
        batch.append(port_pb2.Frame(data=frame))
        if len(batch) == FRAMES_PER_MESSAGE:
            yield batch
            batch = []
    if batch:
        yield batch
