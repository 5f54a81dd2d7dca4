"""Streams of both clients against a daemon that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from vswitch_api.v1 import (
    capture_pb2,
    capture_pb2_grpc,
    partition_pb2,
    partition_pb2_grpc,
    port_pb2,
    port_pb2_grpc,
)
from vswitchctl.aio import AsyncClient
from vswitchctl.client import Client
from vswitchctl.errors import VswitchError

pytestmark = pytest.mark.timeout(60)


class Partitions(partition_pb2_grpc.PartitionServiceServicer):
    """`cat` gives back what it reads, `true` ends without reading, `sleep` neither reads nor ends; of any
    other the stream ends early.
    """

    async def Exec(self, requests: Any, context: Any) -> AsyncIterator[partition_pb2.ExecResponse]:
        start = (await anext(requests)).start
        yield partition_pb2.ExecResponse(started=partition_pb2.ExecStarted())
        if start.argv[0] == "true":
            yield partition_pb2.ExecResponse(exit=partition_pb2.ExecExit(status=0))
        if start.argv[0] == "sleep":
            await asyncio.Event().wait()
        async for request in requests:
            if request.WhichOneof("message") == "stdin_end":
                break
            if start.argv[0] == "cat":
                yield partition_pb2.ExecResponse(stdout=request.stdin)
        if start.argv[0] == "cat":
            yield partition_pb2.ExecResponse(exit=partition_pb2.ExecExit(status=0))
            async for _ in requests:
                pass

    async def Console(self, requests: Any, context: Any) -> AsyncIterator[partition_pb2.ConsoleResponse]:
        await anext(requests)
        yield partition_pb2.ConsoleResponse()
        async for _ in requests:
            await context.abort(grpc.StatusCode.ABORTED, "the machine is gone")


class Ports(port_pb2_grpc.PortServiceServicer):
    async def PortIo(self, requests: Any, context: Any) -> AsyncIterator[port_pb2.PortIoResponse]:
        await anext(requests)
        yield port_pb2.PortIoResponse(opened=port_pb2.PortIoOpened())
        async for _ in requests:
            await context.abort(grpc.StatusCode.ABORTED, "the port is gone")

    async def InjectFrames(self, requests: Any, context: Any) -> port_pb2.InjectFramesResponse:
        count = 0
        async for request in requests:
            count += len(request.frames)
        await asyncio.sleep(0.5)
        return port_pb2.InjectFramesResponse(frames=count)


class Captures(capture_pb2_grpc.CaptureServiceServicer):
    """Of a source `switches/none` nothing; else one piece, as long as a message may be."""

    async def Capture(self, request: Any, context: Any) -> AsyncIterator[capture_pb2.CaptureResponse]:
        if request.sources[0] != "switches/none":
            yield capture_pb2.CaptureResponse(pcapng=bytes(17 << 20))


@pytest.fixture
async def socket(tmp_path: Path) -> AsyncIterator[Path]:
    server = grpc.aio.server()
    partition_pb2_grpc.add_PartitionServiceServicer_to_server(Partitions(), server)
    port_pb2_grpc.add_PortServiceServicer_to_server(Ports(), server)
    capture_pb2_grpc.add_CaptureServiceServicer_to_server(Captures(), server)
    path = tmp_path / "api.sock"
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield path
    await server.stop(None)


@pytest.fixture
async def client(socket: Path) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(socket) as client:
        yield client


async def test_a_command_that_answers_while_it_reads_gets_all_its_input(client: AsyncClient) -> None:
    # More than what the two sides and gRPC between them keep.
    data = bytes(range(256)) * (1 << 17)
    done = await client.run_in("a", ["cat"], stdin=data, timeout=30)
    assert done.ok
    assert done.stdout == data


async def test_a_command_that_ends_without_reading_its_input_has_ended(client: AsyncClient) -> None:
    assert (await client.run_in("a", ["true"], stdin=bytes(4 << 20), timeout=30)).ok


async def test_a_command_that_never_ends_is_given_up_with_its_input_unsent(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        await client.run_in("a", ["sleep"], stdin=bytes(4 << 20), timeout=0.2)


@pytest.mark.parametrize("kind", ["exec", "console", "port_io"])
async def test_what_the_caller_raises_in_the_block_is_what_it_gets(client: AsyncClient, kind: str) -> None:
    opened: dict[str, Any] = {
        "exec": client.exec("a", ["sleep"]),
        "console": client.console("a"),
        "port_io": client.port_io("s0/a"),
    }
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.InvalidStateError, match="mine"):
            async with opened[kind]:
                raise asyncio.InvalidStateError("mine")


async def test_a_stream_that_breaks_says_why_inside_the_block(client: AsyncClient) -> None:
    async with client.port_io("s0/a") as port:
        await port.send(bytes(60))
        for _ in range(2):
            with pytest.raises(VswitchError, match="the port is gone"):
                await port.receive()
        with pytest.raises(VswitchError, match="the port is gone"):
            await port.send(bytes(60))
    async with client.console("a") as console:
        await console.write(b"x")
        with pytest.raises(VswitchError, match="the machine is gone"):
            async for _ in console:
                pass
    async with client.exec("a", ["broken"]) as command:
        await command.close_stdin()
        with pytest.raises(VswitchError, match="the daemon ended the stream"):
            async for _ in command:
                pass


async def test_a_capture_that_ends_before_it_began_is_an_error_of_the_daemon(
    client: AsyncClient, socket: Path
) -> None:
    with pytest.raises(VswitchError, match="the daemon ended the stream"):
        async with client.capture("switches/none"):
            pass

    def blocking() -> None:
        with Client(socket) as sync, sync.capture("switches/none"):
            pass

    with pytest.raises(VswitchError, match="the daemon ended the stream"):
        await asyncio.to_thread(blocking)


async def test_clients_take_messages_as_long_as_the_daemon_does(client: AsyncClient, socket: Path) -> None:
    async with client.capture("switches/s0") as capture:
        assert [len(piece) async for piece in capture] == [17 << 20]

    def blocking() -> list[int]:
        with Client(socket) as sync, sync.capture("switches/s0") as responses:
            return [len(response.pcapng) for response in responses]

    assert await asyncio.to_thread(blocking) == [17 << 20]


async def test_injection_has_no_deadline(socket: Path) -> None:
    frames = [bytes(60)] * 3
    async with AsyncClient(socket, timeout=0.1) as client:
        assert (await client.inject("s0/a", frames)).frames == 3

    def blocking() -> int:
        with Client(socket, timeout=0.1) as sync:
            return sync.inject("s0/a", frames).frames

    assert await asyncio.to_thread(blocking) == 3
