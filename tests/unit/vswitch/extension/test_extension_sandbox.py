"""The cage of an extension's process, tried from inside and read from /proc outside."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from upcalls import RecordingStack, alive, status_of, until

from vswitch.extension.host import ExtensionHost
from vswitch_confine import probe

NOBODY = 65534
SUPPORT = Path(__file__).resolve().parents[3] / "support"
ROOT = str(Path(__file__).resolve().parents[4])
FRAME = bytes(Ether() / IP() / TCP())
ATTEMPT = """
from vswitch.extension import Filter

class Attempt(Filter):
    def ingress(self, packet):
        {code}
        return packet.drop("it was allowed")
"""


@pytest.fixture
async def stack() -> RecordingStack:
    return RecordingStack()


@pytest.fixture
async def host(stack: RecordingStack) -> AsyncIterator[ExtensionHost]:
    host = ExtensionHost(stack)
    yield host
    await host.close()


async def outcome(host: ExtensionHost, stack: RecordingStack, code: str) -> str:
    """What comes of running `code` inside an extension: its error, or "it was allowed"."""
    source = ATTEMPT.format(code=code.replace("\n", "\n        "))
    await host.load("attempt", source.encode(), "attempt.py")
    return (await stack.asker().ask(FRAME)).reason


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)", "PermissionError: [Errno 1]"),
        ("import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)", "PermissionError: [Errno 1]"),
        ("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "PermissionError: [Errno 1]"),
        ("open('/etc/shadow')", "PermissionError: [Errno 13]"),
        ("open('/etc/passwd')", "PermissionError: [Errno 13]"),
        ("import os; os.listdir({home!r})", "PermissionError: [Errno 13]"),
        ("open('/tmp/vswitch-extension-was-here', 'w')", "PermissionError: [Errno 13]"),
        ("open('/proc/self/mem', 'r+b')", "PermissionError: [Errno 13]"),
        ("open('/dev/net/tun', 'r+b')", "PermissionError: [Errno 13]"),
        ("import os; os.kill({daemon}, 9)", "PermissionError: [Errno 1]"),
        ("import os; os.kill(-1, 9)", "PermissionError: [Errno 1]"),
        ("import os; os.pidfd_open({daemon})", "PermissionError: [Errno 1]"),
        ("import os\nwhile True: os.fork()", "PermissionError: [Errno 1]"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError: [Errno 1]"),
        ("import os; os.execv('/bin/sh', ['sh'])", "PermissionError: [Errno 1]"),
        ("import os; os.unlink({own!r})", "PermissionError: [Errno 1]"),
        ("import os; os.memfd_create('x')", "PermissionError: [Errno 1]"),
        ("import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETFL, 0)", "PermissionError: [Errno 1]"),
        ("import os; os.set_blocking(1, True)", "PermissionError: [Errno 1]"),
        ("bytearray(1 << 40)", "MemoryError"),
        (
            "from vswitch_confine import libc; libc.unshare(libc.CLONE_NEWUSER)",
            "PermissionError: [Errno 1]",
        ),
        (
            "from vswitch_confine import libc; libc.mount('none', '/', 'tmpfs', 0)",
            "PermissionError: [Errno 1]",
        ),
        (
            "import ctypes; ctypes.CDLL(None, use_errno=True).ptrace(16, {daemon}, 0, 0) == -1 or 1 / 0\n"
            "raise PermissionError('ptrace')",
            "PermissionError: ptrace",
        ),
    ],
)
async def test_what_an_extension_has_no_business_with_is_refused(
    host: ExtensionHost, stack: RecordingStack, code: str, error: str
) -> None:
    home = str(Path.home())
    given = code.replace("{daemon}", str(os.getpid())).replace("{home!r}", repr(home))
    answer = await outcome(host, stack, given.replace("{own!r}", repr(sys.executable)))
    assert error in answer
    assert answer.startswith("attempt.py:")
    assert host.get("attempt").state.value == "running", "the attempt failed and the extension lives on"
    assert "vswitch-extension-was-here" not in os.listdir("/tmp")


async def test_what_an_extension_needs_works(host: ExtensionHost, stack: RecordingStack) -> None:
    code = "import ipaddress, decimal, zlib, hashlib, random, time, re, dpkt\ntime.sleep(0)\nrandom.random()"
    assert await outcome(host, stack, code) == "it was allowed"


async def test_the_kernel_says_of_the_process_that_it_is_confined(host: ExtensionHost) -> None:
    source = ATTEMPT.format(code="pass").encode()
    info = await host.load("attempt", source, "attempt.py")
    status = status_of(info.pid)
    assert status["Seccomp"].strip() == "2"
    assert status["NoNewPrivs"].strip() == "1"
    for capabilities in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert status[capabilities].strip() == "0" * 16
    assert status["Threads"].strip() == "1"
    if probe.probe()[0].available:
        assert status["NSpid"].split() == [str(info.pid), "1"]
        for namespace in ("user", "pid", "net", "mnt", "ipc"):
            inside = os.readlink(f"/proc/{info.pid}/ns/{namespace}")
            assert inside != os.readlink(f"/proc/self/ns/{namespace}")
        assert info.layers[0] == "namespaces"
        assert info.missing == ()


async def test_it_holds_its_channel_and_nothing_else_of_the_daemon(host: ExtensionHost) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        info = await host.load("attempt", ATTEMPT.format(code="pass").encode(), "attempt.py")
        held = [os.readlink(f"/proc/{info.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{info.pid}/fd")]
    finally:
        os.close(secret)
    kinds = sorted("".join(c for c in link if not c.isdigit()) for link in held)
    # Standard input is the source, standard output and error are one pipe.
    assert kinds == [
        "/memfd:vswitch-extension-source (deleted)",
        "/memfd:vswitch-upcall- (deleted)",
        "anon_inode:[eventfd]",
        "anon_inode:[eventfd]",
        "pipe:[]",
        "pipe:[]",
        "socket:[]",
    ]


async def test_nothing_of_the_daemon_s_environment_is_in_it(
    host: ExtensionHost, stack: RecordingStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    answer = await outcome(
        host, stack, "import os\nassert 'SECRET_TOKEN' not in os.environ and 'HOME' not in os.environ"
    )
    assert answer == "it was allowed"


async def test_the_process_ends_when_the_daemon_is_killed(tmp_path: Path) -> None:
    """A daemon that dies leaves no extension behind."""
    script = tmp_path / "daemon.py"
    script.write_text(
        "import asyncio, os, signal, sys\n"
        f"sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from upcalls import RecordingStack\n"
        "from vswitch.extension.host import ExtensionHost\n"
        "async def main():\n"
        "    host = ExtensionHost(RecordingStack())\n"
        f"    info = await host.load('x', {ATTEMPT.format(code='pass').encode()!r}, 'x.py')\n"
        "    print(info.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await child.communicate()
    await until(lambda: not alive(int(output)))


AS_DAEMON = """
import asyncio, json, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
{before}
from upcalls import RecordingStack, request_for, status_of
from vswitch.extension.host import ExtensionHost

async def main():
    stack = RecordingStack()
    host = ExtensionHost(stack)
    info = await host.load("attempt", {source!r}, "attempt.py")
    reply = await stack.asker().ask({frame!r})
    status = status_of(info.pid)
    report = dict(
        uid=status["Uid"].split()[0],
        seccomp=status["Seccomp"].strip(),
        no_new_privs=status["NoNewPrivs"].strip(),
        capabilities=status["CapEff"].strip(),
        answer=reply.reason,
        layers=info.layers,
        missing=info.missing,
    )
    await host.close()
    print(json.dumps(report))

asyncio.run(main())
"""
NO_NAMESPACES = """
from vswitch_confine import namespaces
namespaces.unshare(pid=False, net=False)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
"""


def readable_python() -> str:
    """An interpreter of this version that every user can run."""
    own = Path(sys.executable).resolve()
    if all(parent.stat().st_mode & 0o001 for parent in own.parents):
        return sys.executable
    found = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip(f"{own} is private to root, and /usr/bin has no Python of its version")
    return found


def in_a_daemon(code: str, *, before: str = "", ordinary_user: bool = False) -> dict[str, Any]:
    """What becomes of an extension that runs `code`, in a daemon of its own process."""
    source = ATTEMPT.format(code=code).encode()
    script = AS_DAEMON.format(tests=str(SUPPORT), root=ROOT, before=before, source=source, frame=FRAME)
    command = [sys.executable, "-c", script]
    if ordinary_user and os.geteuid() == 0:
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
        command = [*nobody, readable_python(), "-B", "-c", script]
    done = subprocess.run(command, capture_output=True, timeout=50, check=False, cwd="/")
    assert done.returncode == 0, done.stderr.decode()
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_extensions_of_an_ordinary_user_are_confined_alike() -> None:
    report = in_a_daemon("open('/etc/passwd')", ordinary_user=True)
    assert report["uid"] == str(NOBODY if os.geteuid() == 0 else os.geteuid())
    assert (report["seccomp"], report["no_new_privs"], report["capabilities"]) == ("2", "1", "0" * 16)
    assert "PermissionError: [Errno 13]" in report["answer"]
    assert "seccomp" in report["layers"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import socket; socket.socket()", "PermissionError: [Errno 1]"),
        ("open('/etc/passwd')", "PermissionError: [Errno 13]"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError: [Errno 1]"),
        ("import os; os.fork()", "PermissionError: [Errno 1]"),
    ],
)
def test_where_namespaces_are_forbidden_the_other_layers_hold_and_the_lack_is_told(
    code: str, error: str
) -> None:
    report = in_a_daemon(code, before=NO_NAMESPACES)
    assert error in report["answer"]
    assert (report["seccomp"], report["no_new_privs"], report["capabilities"]) == ("2", "1", "0" * 16)
    (missing,) = report["missing"]
    assert "namespaces: the kernel refused it" in missing
    assert "sysctl -w user.max_user_namespaces=15000" in missing
    assert "namespaces" not in report["layers"]
