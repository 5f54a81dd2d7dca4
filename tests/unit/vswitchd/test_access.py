"""Who may do what: every method has a role, and roles contain each other."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vswitch_api.v1 import (
    capture_pb2,
    daemon_pb2,
    extension_pb2,
    nic_pb2,
    partition_pb2,
    port_pb2,
    switch_pb2,
    trace_pb2,
    watch_pb2,
)
from vswitchd import front
from vswitchd.access import METHOD_ROLES, AccessPolicy, Role, needed_role

MODULES = (
    capture_pb2,
    daemon_pb2,
    extension_pb2,
    nic_pb2,
    partition_pb2,
    port_pb2,
    switch_pb2,
    trace_pb2,
    watch_pb2,
)


def api_methods() -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for module in MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_method_of_the_api_has_a_role_and_nothing_else_has() -> None:
    assert set(METHOD_ROLES) == api_methods()


@pytest.mark.parametrize("method", sorted(api_methods()))
def test_looking_is_for_viewers_use_for_operators_and_making_or_deleting_for_admins(method: str) -> None:
    name = method.rpartition("/")[2]
    if name.startswith(("Get", "List", "Watch", "Trace")):
        needed = Role.VIEWER
    elif name.startswith(("Create", "BatchCreate", "Delete", "Shutdown")) and name != "DeleteCapture":
        needed = Role.ADMIN
    else:
        needed = Role.OPERATOR
    assert needed_role(method) is needed


def test_a_method_that_no_table_names_is_for_nobody() -> None:
    assert needed_role("/vswitch.v1.SwitchService/Nonsense") is None


def test_the_owner_and_root_are_admins_and_strangers_are_nobody() -> None:
    policy = AccessPolicy({1000: Role.VIEWER, 1001: Role.OPERATOR}, owner=500)
    assert policy.role_of(500) is Role.ADMIN
    assert policy.role_of(0) is Role.ADMIN
    assert policy.role_of(1000) is Role.VIEWER
    assert policy.role_of(1001) is Role.OPERATOR
    assert policy.role_of(1002) is Role.NONE


def test_a_grant_cannot_take_the_owners_role() -> None:
    assert AccessPolicy({500: Role.VIEWER}, owner=500).role_of(500) is Role.ADMIN


def test_peer_credentials_are_the_kernels() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert front.peer_credentials(ours) == (os.getpid(), os.geteuid(), os.getegid())


def test_a_peer_in_another_user_namespace_is_not_one_of_us() -> None:
    with tempfile.TemporaryDirectory() as directory:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{directory}/s")
        listener.listen()
        connect = (
            f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('{directory}/s'); s.recv(1)"
        )
        for prefix, ours in (([], True), (["unshare", "--user", "--map-root-user"], False)):
            peer = subprocess.Popen([*prefix, sys.executable, "-c", connect])
            connection, _ = listener.accept()
            pid, uid, _ = front.peer_credentials(connection)
            assert uid == os.geteuid()
            assert front.in_our_user_namespace(connection, pid) is ours
            connection.close()
            peer.wait(10)
        listener.close()


async def echo_server(path: Path, word: bytes) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(word + await reader.readline())
        await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, path=str(path))


@pytest.mark.parametrize(("role", "word"), [(Role.VIEWER, b"viewer "), (Role.NONE, b"none ")])
async def test_the_front_joins_a_connection_to_the_server_of_its_peers_role(
    role: Role, word: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "peer_credentials", lambda connection: (1, 4242, 4242))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        servers = {each: root / each.name for each in Role}
        running = [
            await echo_server(path, f"{each.name.lower()} ".encode()) for each, path in servers.items()
        ]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(root / "api"))
        listener.listen()
        policy = AccessPolicy({4242: role} if role is not Role.NONE else {}, owner=7)
        gate = front.Front(listener, policy, servers)
        gate.start()
        reader, writer = await asyncio.open_unix_connection(str(root / "api"))
        writer.write(b"hello\n")
        assert await asyncio.wait_for(reader.read(), 5) == word + b"hello\n"
        writer.close()
        await gate.close()
        for server in running:
            server.close()


async def test_one_user_cannot_take_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "peer_credentials", lambda connection: (1, 4242, 4242))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        servers = {each: root / each.name for each in Role}
        running = [await echo_server(path, b"") for path in servers.values()]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(root / "api"))
        listener.listen(64)
        gate = front.Front(listener, AccessPolicy({}, owner=7), servers)
        gate.start()
        held = [await asyncio.open_unix_connection(str(root / "api")) for _ in range(front.MAX_FOREIGN)]
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_unix_connection(str(root / "api"))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        for _, other in [*held, (reader, writer)]:
            other.close()
        await gate.close()
        for server in running:
            server.close()


async def test_a_peer_that_takes_nothing_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "peer_credentials", lambda connection: (1, 4242, 4242))
    monkeypatch.setattr(front, "LINGER_SECONDS", 0.3)
    left: list[int] = []

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # More than the peer's socket takes, less than would stop the front from reading on.
        writer.write(bytes(240_000))
        await asyncio.sleep(0.1)
        left.extend(
            half._transport.get_write_buffer_size() for half in gate._halves if half._transport is not None
        )
        writer.close()

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        servers = {each: root / each.name for each in Role}
        running = [await asyncio.start_unix_server(flood, path=str(path)) for path in servers.values()]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(root / "api"))
        listener.listen(64)
        gate = front.Front(listener, AccessPolicy({}, owner=7), servers)
        gate.start()
        before = len(os.listdir("/proc/self/fd"))
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(root / "api"))
            async with asyncio.timeout(5):
                while not left or len(os.listdir("/proc/self/fd")) > before + 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert max(left) > 0, "the peer's socket took everything"
        await gate.close()
        for server in running:
            server.close()
