"""Guests under a real daemon: start, commands inside, captures, sockets on ports, death and return."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from waiting import eventually

import vswitch_native
from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchctl import capture_file
from vswitchctl.aio import AsyncClient
from vswitchctl.errors import VswitchError

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon, StartDaemon

pytestmark = pytest.mark.timeout(120)

ENGINES = ["python", *(["native"] if vswitch_native.AVAILABLE else [])]
PING = [sys.executable, "-m", "netvsc.probe", "ping", "10.0.0.2", "--count", "3", "--interval", "0.05"]
RUNNING = partition_pb2.PARTITION_STATE_RUNNING
FAILED = partition_pb2.PARTITION_STATE_FAILED


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest, daemon_factory: StartDaemon) -> RunningDaemon:
    """A daemon with two guests, a (10.0.0.1) and b (10.0.0.2), on one switch."""
    daemon = daemon_factory(engine=request.param)
    daemon.client.create_switch("s0")
    for number, name in enumerate("ab", 1):
        daemon.client.create_partition(name, hosts={"a": ["10.0.0.1"], "b": ["10.0.0.2"]})
        daemon.client.create_nic(f"{name}/eth0", port=f"s0/{name}", addresses=[f"10.0.0.{number}/24"])
    for name in "ab":
        daemon.client.start_partition(name)
    return daemon


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ping(daemon: RunningDaemon) -> bool:
    return daemon.client.run_in("a", PING, timeout=30).ok


def test_guests_run_commands_and_ping_each_other(pair: RunningDaemon) -> None:
    client = pair.client
    assert ping(pair)
    done = client.run_in("a", ["/bin/sh", "-c", "hostname; cat; echo oops >&2; exit 3"], stdin=b"typed\n")
    assert (done.status, done.stdout, done.stderr) == (3, b"a\ntyped\n", b"oops\n")
    done = client.run_in("a", ["/bin/sh", "-c", "kill -TERM $$"])
    assert (done.signal, done.ok) == (signal.SIGTERM, False)
    done = client.run_in("a", ["/no/such/command"])
    assert done.status == 127
    assert "/no/such/command" in done.detail
    big = os.urandom(3 << 20)
    assert client.run_in("b", ["cat"], stdin=big, timeout=30).stdout == big
    nic = client.get_nic("a/eth0")
    assert (nic.state, nic.nvsp_version) == (nic_pb2.NIC_STATE_OPEN, "6.1")
    partition = client.get_partition("a")
    assert (partition.state, alive(partition.pid), alive(partition.agent_pid)) == (RUNNING, True, True)
    executed = pair.cli("partition", "exec", "b", "--", "sh", "-c", "echo from $(hostname); exit 7")
    assert (executed.returncode, executed.stdout) == (7, "from b\n")
    stopped = client.stop_partition("a")
    assert stopped.state == partition_pb2.PARTITION_STATE_STOPPED
    assert not alive(partition.pid)
    assert not alive(partition.agent_pid)
    with pytest.raises(VswitchError, match="partitions/a does not run") as error:
        client.run_in("a", ["true"])
    assert error.value.reason == "NOT_RUNNING"
    client.start_partition("a")
    assert ping(pair)
    with pytest.raises(VswitchError, match="partitions/b runs"):
        client.delete_partition("b")
    client.delete_partition("b", force=True)
    assert [port.name for port in client.list_ports()] == ["switches/s0/ports/a"]


async def test_a_terminal_has_its_size_and_hanging_up_kills_the_command(pair: RunningDaemon) -> None:
    async with AsyncClient(pair.socket) as client:
        async with client.exec("a", ["/bin/sh", "-c", "stty size; tty; exec cat"], terminal=(33, 99)) as tty:
            output = b""
            async for response in tty:
                output += response.stdout
                if b"/dev/" in output or b"not a tty" in output:
                    break
        assert b"33 99" in output
        marker = f"{time.time_ns()}"
        async with client.exec("a", ["/bin/sh", "-c", f"sleep 1000; echo {marker}"]) as sleeper:
            first = await anext(aiter(sleeper))
            assert first.HasField("started")
            await asyncio.to_thread(eventually, lambda: marker in _command_lines())
        await asyncio.to_thread(eventually, lambda: marker not in _command_lines())
        async with client.exec("a", ["sleep", "1000"]) as sleeper:
            await sleeper.send_signal(signal.SIGINT)
            async for _ in sleeper:
                pass
        assert sleeper.exit is not None
        assert sleeper.exit.signal == signal.SIGINT


def _command_lines() -> str:
    """The command lines of all processes that are shells: ours only holds the marker in its memory."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"sh"):
            lines.append(b" ".join(words).decode(errors="replace"))
    return "\n".join(lines)


async def test_a_capture_holds_the_pings_and_ends_in_good_order(pair: RunningDaemon) -> None:
    async with AsyncClient(pair.socket) as client:
        async with client.capture("switches/s0/ports/a") as stream:
            await client.run_in("a", PING, timeout=30)
            assert [each.name for each in await client.list_captures()] == [stream.capture.name]
            await client.stop_capture(stream.capture.name)
            data = b"".join([piece async for piece in stream])
        records = list(capture_file.read(io.BytesIO(data)))
        echoes = [record for record in records if record.data[12:14] == b"\x08\x00" and record.data[23] == 1]
        assert sum(record.direction == "in" for record in echoes) == 3
        assert sum(record.direction == "out" for record in echoes) == 3
        assert {record.interface for record in records} == {"a"}
        assert stream.capture.packets == len(records)
        assert await client.list_captures() == []
        async with client.capture("partitions/a", vmbus=True) as stream:
            await client.run_in("a", PING, timeout=30)
            await asyncio.sleep(0.1)
            await client.stop_capture(stream.capture.name)
            data = b"".join([piece async for piece in stream])
        kinds = {record.data[2] for record in capture_file.read(io.BytesIO(data))}
        assert 2 in kinds  # ring packets of the NIC's channel


async def test_a_socket_on_a_port_is_a_host_on_the_switch(pair: RunningDaemon) -> None:
    pair.client.create_port("s0/tap")
    me, me_ip = bytes.fromhex("02000000beef"), bytes([10, 0, 0, 77])
    request = (
        b"\xff" * 6
        + me
        + bytes.fromhex("08060001080006040001")
        + me
        + me_ip
        + bytes(6)
        + bytes([10, 0, 0, 2])
    )
    async with AsyncClient(pair.socket) as client:
        async with client.port_io("s0/tap") as port:
            await port.send(request)
            async with asyncio.timeout(10):
                while True:
                    frame = await port.receive()
                    if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
                        break
            assert frame[:6] == me
            assert frame[28:32] == bytes([10, 0, 0, 2])
            with pytest.raises(VswitchError, match="is in use by PortIo stream"):
                async with client.port_io("s0/tap"):
                    pass
        async with client.port_io("s0/a", monitor=True) as port:
            pinging = asyncio.create_task(client.run_in("a", PING, timeout=30))
            async with asyncio.timeout(10):
                while (await port.receive())[12:14] != b"\x08\x00":
                    pass
            assert (await pinging).ok
    pair.client.delete_port("s0/tap")


def test_a_killed_guest_is_noticed_said_and_cleaned_up(pair: RunningDaemon) -> None:
    client = pair.client
    pid = client.get_partition("b").pid
    stream = client.watch(["partitions/b"], snapshot=False)
    assert next(stream).HasField("synced")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: client.get_partition("b").state == FAILED)
    assert "was killed by SIGKILL" in client.get_partition("b").detail
    events = [next(stream) for _ in range(2)]
    assert [event.event.kind for event in events if event.HasField("event")] == ["guest_lost"]
    stream.close()  # type: ignore[attr-defined]
    assert client.get_partition("a").state == RUNNING
    client.start_partition("b")
    assert ping(pair)


def test_after_kill_9_the_next_daemon_finds_everything_again(pair: RunningDaemon) -> None:
    client = pair.client
    plugin = Path(__file__).parents[2] / "examples" / "extensions" / "block_telnet.py"
    client.load_extension("s0", "block_telnet", plugin.read_bytes(), file_name="block_telnet.py")
    client.create_port("s0/spare", friendly_name="kept")
    client.create_partition("gone")
    client.start_partition("gone")
    before = {name: client.get_partition(name).pid for name in ("a", "b", "gone")}
    extension = client.get_extension("s0/block_telnet").pid
    pair.kill()
    os.kill(before["gone"], signal.SIGKILL)
    assert alive(before["a"])
    assert alive(before["b"])
    eventually(lambda: not alive(extension))
    pair.restart()
    restore = client.get_info().restore
    assert list(restore.reattached) == ["partitions/a", "partitions/b"]
    assert list(restore.gone) == ["partitions/gone"]
    assert client.get_partition("gone").state == FAILED
    assert "ended while there was no daemon" in client.get_partition("gone").detail
    assert {name: client.get_partition(name).pid for name in "ab"} == {name: before[name] for name in "ab"}
    assert client.get_port("s0/spare").friendly_name == "kept"
    assert client.get_extension("s0/block_telnet").pid not in (0, extension)
    assert ping(pair)
    with pytest.raises(VswitchError) as error:
        client.create_switch("s0")
    assert error.value.code is grpc.StatusCode.ALREADY_EXISTS


def test_an_orderly_end_leaves_guests_to_the_next_daemon(pair: RunningDaemon) -> None:
    pid = pair.client.get_partition("a").pid
    assert pair.process.terminate() == 0
    assert alive(pid)
    pair.restart()
    assert pair.client.get_partition("a").pid == pid
    assert ping(pair)
    done = pair.cli("daemon", "stop")
    assert done.stderr == "2 guests live on and wait 30 s for `vswitch daemon start`\n"
    assert alive(pid)
    pair.restart()
    assert pair.client.get_partition("a").pid == pid


def test_stopping_the_guests_too_leaves_no_process(pair: RunningDaemon) -> None:
    partitions = pair.client.list_partitions()
    done = pair.cli("daemon", "stop", "--stop-guests")
    assert done.returncode == 0, done.stderr
    assert not any(alive(partition.pid) or alive(partition.agent_pid) for partition in partitions)
    assert not list((pair.run_dir / "doors").glob("*"))
    pair.restart()
    assert {partition.state for partition in pair.client.list_partitions()} == {
        partition_pb2.PARTITION_STATE_STOPPED
    }


def test_a_caller_whose_deadline_passes_leaves_no_half_started_guest(daemon: RunningDaemon) -> None:
    client = daemon.client
    client.create_partition("a")
    start = client.channel.unary_unary(
        "/vswitch.v1.PartitionService/StartPartition",
        request_serializer=partition_pb2.StartPartitionRequest.SerializeToString,
        response_deserializer=partition_pb2.StartPartitionResponse.FromString,
    )
    with pytest.raises(grpc.RpcError) as error:
        start(partition_pb2.StartPartitionRequest(name="partitions/a"), timeout=0.1)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    eventually(lambda: client.get_partition("a").state == FAILED)
    assert client.get_partition("a").pid == 0
    assert client.start_partition("a").state == RUNNING


def test_a_watcher_sees_a_guest_come_up(daemon: RunningDaemon) -> None:
    client = daemon.client
    client.create_switch("s0")
    client.create_partition("a")
    client.create_nic("a/eth0", port="s0/a")
    stream = client.watch(["partitions/a"], snapshot=False)
    assert next(stream).HasField("synced")
    client.start_partition("a")
    states = []
    for response in stream:
        if response.change.HasField("nic"):
            states.append(response.change.nic.state)
            if states[-1] == nic_pb2.NIC_STATE_OPEN:
                break
    assert nic_pb2.NIC_STATE_OFFERED in states
    stream.close()  # type: ignore[attr-defined]


def test_a_guest_that_cannot_start_says_why(daemon: RunningDaemon) -> None:
    client = daemon.client
    client.create_partition("a", guest_link="tap", memory_bytes=4 << 20)
    client.create_switch("s0")
    client.create_nic("a/eth0", port="s0/a")
    log = Path(client.get_partition("a").log_path)
    log.mkdir()  # what stands in the way of the guest's log stands in the way of the guest
    with pytest.raises(VswitchError, match="partitions/a did not start") as error:
        client.start_partition("a")
    assert error.value.reason == "GUEST_DID_NOT_START"
    assert "vswitch doctor" in error.value.remedy
    assert client.get_partition("a").state == FAILED
    log.rmdir()
    assert client.start_partition("a").state == RUNNING
