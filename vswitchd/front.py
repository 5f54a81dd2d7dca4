"""The accepting front: asks the kernel who a peer is and hands its connection to the server of that peer's
role.

gRPC does not tell a servicer who is at the other end of a Unix socket, so each role has a server of its own,
on a socket inside the run directory that only this user can reach; the front joins the peer's connection to
it.

Limits: `MAX_CONNECTIONS` in all, `MAX_FOREIGN` for one user that is not an admin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from vswitchd.access import AccessPolicy, Role

log = logging.getLogger("vswitchd.access")

MAX_CONNECTIONS = 512
MAX_FOREIGN = 16
LINGER_SECONDS = 5.0
# asm-generic/socket.h, Linux 6.5.
SO_PEERPIDFD = 77
# struct ucred of SO_PEERCRED, unix(7): pid, uid, gid.
UCRED = struct.Struct("=iII")


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected, as the kernel saw it then."""
    pid, uid, gid = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid, gid


def in_our_user_namespace(connection: socket.socket, pid: int) -> bool:
    """Whether the peer lives where this daemon does. Guests and extensions do not, in spite of their uid."""
    try:
        theirs = os.stat(f"/proc/{pid}/ns/user").st_ino
        pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except FileNotFoundError:
        return False  # It has ended, or its pid namespace is not ours.
    except PermissionError:
        return False  # Of our uid and yet closed to us: confined.
    except OSError:
        pidfd = -1  # Before Linux 6.5 the pid has to do.
    if pidfd >= 0:
        # It still lives, so the pid was its own when we looked.
        ended, _, _ = select.select([pidfd], [], [], 0)
        os.close(pidfd)
        if ended:
            return False
    return theirs == os.stat("/proc/self/ns/user").st_ino


class Front:
    """Accepts on `listener` until closed."""

    def __init__(self, listener: socket.socket, policy: AccessPolicy, servers: Mapping[Role, Path]) -> None:
        self._listener = listener
        self._policy = policy
        self._servers = servers
        self._halves: set[_Half] = set()
        self._joins: set[asyncio.Task[None]] = set()
        self._users: Counter[int] = Counter()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._listener.setblocking(False)
        self._task = asyncio.create_task(self._accept(), name="front")

    async def close(self) -> None:
        """Accepts no more and drops what is open."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._listener.close()
        for task in list(self._joins):
            task.cancel()
        for half in list(self._halves):
            half.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("accept_failed", extra={"error": str(error)})
                await asyncio.sleep(0.1)  # Out of descriptors: let some be closed.
                continue
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        try:
            pid, uid, _ = peer_credentials(connection)
        except OSError:
            connection.close()
            return
        role = self._policy.role_of(uid)
        if uid == self._policy.owner and not in_our_user_namespace(connection, pid):
            log.warning("refused_namespace", extra={"uid": uid, "pid": pid})
            role = Role.NONE
        limit = MAX_CONNECTIONS if role is Role.ADMIN else MAX_FOREIGN
        if self._users.total() >= MAX_CONNECTIONS or self._users[uid] >= limit:
            log.warning("too_many_connections", extra={"uid": uid, "pid": pid, "limit": limit})
            connection.close()
            return
        if role is Role.NONE:
            log.warning("refused_user", extra={"uid": uid, "pid": pid})
        else:
            log.debug("connected", extra={"uid": uid, "pid": pid, "role": role.name.lower()})
        self._users[uid] += 1
        task = asyncio.create_task(self._join(connection, role, uid))
        self._joins.add(task)
        task.add_done_callback(self._joins.discard)

    async def _join(self, connection: socket.socket, role: Role, uid: int) -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        outer, inner = _Half(ended), _Half(ended)
        outer.other, inner.other = inner, outer
        try:
            await loop.create_unix_connection(lambda: inner, path=str(self._servers[role]))
            self._halves.add(inner)
            await loop.connect_accepted_socket(lambda: outer, connection)
            self._halves.add(outer)
            await ended
        except OSError as error:
            log.error("join_failed", extra={"role": role.name.lower(), "error": str(error)})
            connection.close()
        finally:
            self._users[uid] -= 1
            for half in (outer, inner):
                half.close()
                self._halves.discard(half)


class _Half(asyncio.Protocol):
    """One end of a joined connection: what it reads, `other` writes, at the pace that `other` can take."""

    other: _Half

    def __init__(self, ended: asyncio.Future[None]) -> None:
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._early = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.other._transport is None:
            self._transport.pause_reading()
        else:
            self._transport.write(bytes(self.other._early))
            self.other._early.clear()
            self.other._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self.other._transport is not None:
            self.other._transport.write(data)
        else:
            # Up to CPython 3.11.5 a transport that is paused in connection_made() reads nevertheless.
            self._early += data

    def pause_writing(self) -> None:
        if self.other._transport is not None:
            self.other._transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other._transport is not None:
            self.other._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def close(self) -> None:
        """What is still to be written has a moment to go; a peer that takes nothing keeps no descriptor."""
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)
