"""Each layer of confinement does what it says, in a forked child that reports what it could still do."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from vswitch_confine import ConfinementRefused, landlock, libc, limits, namespaces, probe, seccomp
from vswitch_confine.calls import CALLS

NOBODY = 65534


def in_child(action: Callable[[], object], *, ordinary_user: bool = False) -> object:
    """Run `action` in a forked child and return its JSON-able result; an exception comes back as its text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if ordinary_user and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                libc.prctl(
                    libc.PR_SET_DUMPABLE, 1
                )  # cleared by the change of uid; /proc/self is root's otherwise
            answer = action()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"status": status}
    result: object = json.loads(text)
    return result


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "allowed"


def status_line(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(name + ":"))


@pytest.mark.parametrize("ordinary_user", [False, True], ids=["as_is", "ordinary_user"])
def test_namespaces_give_an_own_pid_1_no_network_and_uid_0_inside(ordinary_user: bool) -> None:
    def enter() -> object:
        namespaces.unshare(uts=True, ipc=True)
        reader, writer = os.pipe()
        child = namespaces.fork_first()
        if child == 0:
            namespaces.mount_proc()
            facts = {
                "pid": os.getpid(),
                "uid": os.geteuid(),
                "gid": os.getegid(),
                "interfaces": [name for _, name in socket.if_nameindex()],
                "processes": sorted(name for name in os.listdir("/proc") if name.isdigit()),
            }
            os.write(writer, json.dumps(facts).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            text = stream.read()
        os.waitpid(child, 0)
        return json.loads(text)

    facts = in_child(enter, ordinary_user=ordinary_user)
    assert facts == {"pid": 1, "uid": 0, "gid": 0, "interfaces": ["lo"], "processes": ["1"]}


def test_an_outer_uid_can_stay_visible_as_another_inside() -> None:
    def enter() -> object:
        namespaces.unshare(pid=False, net=False, mount=False, inside_uid=1000, inside_gid=1000)
        return [os.geteuid(), os.getegid()]

    assert in_child(enter) == [1000, 1000]


def test_a_threaded_caller_is_told_why_the_user_namespace_is_refused() -> None:
    def enter() -> object:
        stop = threading.Event()
        threading.Thread(target=stop.wait, daemon=True).start()
        namespaces.unshare()
        return "entered"

    answer = in_child(enter)
    assert isinstance(answer, str)
    assert answer.startswith("ConfinementRefused")
    assert "namespaces: the kernel refused it" in answer
    assert "more than one thread" in answer


def test_the_first_process_dies_with_its_parent() -> None:
    reader, writer = os.pipe()
    outer = os.fork()
    if outer == 0:
        os.close(reader)
        namespaces.unshare(net=False)
        if namespaces.fork_first() == 0:
            os.write(writer, b"up")
            signal.pause()
        os.close(writer)
        signal.pause()
    os.close(writer)
    assert os.read(reader, 2) == b"up"
    os.kill(outer, signal.SIGKILL)
    os.waitpid(outer, 0)
    assert os.read(reader, 1) == b"", "the pipe's last writer was the first process of the namespace"
    os.close(reader)


def test_landlock_leaves_only_the_listed_files_readable_and_nothing_writable(tmp_path: Path) -> None:
    seen, hidden = tmp_path / "seen", tmp_path / "hidden"
    seen.write_text("a")
    hidden.write_text("b")
    seen.chmod(0o666)

    def act() -> object:
        limits.no_new_privileges()
        version = landlock.restrict(readable=[seen, tmp_path / "absent"])
        server = socket.socket(socket.AF_INET)
        return {
            "abi": version,
            "seen": seen.read_text(),
            "hidden": refusal(hidden.read_text),
            "shadow": refusal(Path("/etc/shadow").read_bytes),
            "list": refusal(lambda: os.listdir(tmp_path)),
            "write": refusal(lambda: seen.write_text("c")),
            "create": refusal((tmp_path / "new").touch),
            "remove": refusal(seen.unlink),
            "bind": refusal(lambda: server.bind(("127.0.0.1", 0))),
        }

    answer = in_child(act)
    assert isinstance(answer, dict)
    assert answer.pop("abi") == landlock.abi()
    assert answer.pop("bind") == ("EACCES" if landlock.abi() >= 4 else "allowed")
    denied = dict.fromkeys(("hidden", "shadow", "list", "write", "create", "remove"), "EACCES")
    assert answer == {"seen": "a", **denied}


def test_landlock_can_leave_one_directory_writable(tmp_path: Path) -> None:
    def act() -> object:
        limits.no_new_privileges()
        landlock.restrict(writable=[tmp_path])
        (tmp_path / "new").write_text("written")
        (tmp_path / "new").rename(tmp_path / "renamed")
        return (tmp_path / "renamed").read_text()

    assert in_child(act) == "written"


def test_landlock_without_no_new_privileges_is_refused_to_an_ordinary_user() -> None:
    answer = in_child(lambda: landlock.restrict(), ordinary_user=True)
    assert isinstance(answer, str)
    assert answer.startswith("ConfinementRefused: [Errno 1] Landlock: the kernel refused it")


def test_seccomp_allows_computing_and_refuses_sockets_processes_signals_and_programs() -> None:
    def act() -> object:
        limits.no_new_privileges()
        before = Path("/proc/self/status").read_text()
        assert "Seccomp:\t0" in before
        pid = os.getpid()
        seccomp.restrict()
        return {
            "sum": sum(range(10)),
            "mode": status_line("Seccomp"),
            "no_new_privs": status_line("NoNewPrivs"),
            "socket": refusal(lambda: socket.socket(socket.AF_INET)),
            "unix": refusal(lambda: socket.socket(socket.AF_UNIX)),
            "fork": refusal(os.fork),
            "kill": refusal(lambda: os.kill(pid, 0)),
            "exec": refusal(lambda: os.execv("/bin/true", ["true"])),
            "unshare": refusal(lambda: libc.unshare(libc.CLONE_NEWUSER)),
            "clone3": refusal(lambda: libc.syscall(435, None, 0)),
            "memfd": refusal(lambda: os.memfd_create("x")),
        }

    answer = in_child(act)
    assert answer == {
        "sum": 45,
        "mode": "2",
        "no_new_privs": "1",
        **dict.fromkeys(("socket", "unix", "fork", "kill", "exec", "unshare", "memfd"), "EPERM"),
        "clone3": "ENOSYS",
    }


def evaluate(program: bytes, number: int, machine: int) -> int:
    """A model of the kernel's BPF machine for the four instructions that the filter is made of."""
    data = struct.pack("=II", number, machine)
    accumulator = position = 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x15:
            position += yes if accumulator == value else no
        elif code == 0x35:
            position += yes if accumulator >= value else no
        else:
            assert code == 0x06
            return int(value)


@pytest.mark.parametrize(("machine", "audit"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_decides_every_call_number_of_its_machine_and_kills_foreign_ones(
    machine: str, audit: int
) -> None:
    allowed = ["read", "write", "exit_group"]
    program = seccomp.assemble(allowed, machine)
    numbers = {CALLS[machine][name] for name in allowed}
    for number in range(512):
        expected = 0x7FFF0000 if number in numbers else 0x00050000 | errno.EPERM
        if number == 435:
            expected = 0x00050000 | errno.ENOSYS
        assert evaluate(program, number, audit) == expected
    assert evaluate(program, 0, 0x40000003) == 0x80000000, "i386"
    if machine == "x86_64":
        assert evaluate(program, 0x40000000, audit) == 0x80000000, "x32"


def test_a_misspelt_call_is_an_error_and_not_a_silent_refusal() -> None:
    with pytest.raises(ValueError, match="no system call is named 'raed'"):
        seccomp.assemble(["raed"])


def test_an_unknown_machine_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(ConfinementRefused, match=r"seccomp: .*vax"):
        seccomp.supported()


def test_capabilities_are_gone_after_dropping_them() -> None:
    def act() -> object:
        namespaces.unshare(pid=False, net=False)
        held = status_line("CapEff") != "0" * 16
        libc.drop_capabilities()
        return [held, *(status_line(name) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"))]

    assert in_child(act) == [True, *["0" * 16] * 5]


def test_limits_bind_memory_descriptors_and_processes() -> None:
    def act() -> object:
        limits.set_limits(memory_bytes=1 << 30, descriptors=32, processes=1, file_bytes=0)
        opened: list[int] = []

        def open_many() -> None:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))

        def allocate() -> str:
            try:
                bytearray(2 << 30)
            except MemoryError:
                return "MemoryError"
            return "allowed"

        descriptors = refusal(open_many)
        return {"descriptors": descriptors, "memory": allocate(), "fork": refusal(os.fork)}

    answer = in_child(act, ordinary_user=True)
    assert answer == {"descriptors": "EMFILE", "memory": "MemoryError", "fork": "EAGAIN"}


def test_a_lower_limit_that_is_already_set_stays() -> None:
    def act() -> object:
        limits.set_limits(descriptors=20)
        limits.set_limits(descriptors=64)
        import resource

        return list(resource.getrlimit(resource.RLIMIT_NOFILE))

    assert in_child(act) == [20, 20]


def test_a_non_dumpable_process_hides_its_descriptors_from_its_own_user() -> None:
    reader, writer = os.pipe()
    target = os.fork()
    if target == 0:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        limits.non_dumpable()
        os.write(writer, b".")
        signal.pause()
    assert os.read(reader, 1) == b"."
    answer = in_child(lambda: refusal(lambda: os.listdir(f"/proc/{target}/fd")), ordinary_user=True)
    os.kill(target, signal.SIGKILL)
    os.waitpid(target, 0)
    os.close(reader)
    os.close(writer)
    assert answer in ("EACCES", "EPERM")


def test_descriptors_that_are_not_kept_are_closed() -> None:
    kept, lost = os.pipe()

    def act() -> object:
        report = os.dup(1)
        os.dup2(1, 1)
        limits.close_all_but([kept])
        return [refusal(partial(os.fstat, fd)) for fd in (0, 1, 2, kept, lost, report)]

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.write(1, json.dumps(act()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = json.loads(stream.read())
    os.waitpid(child, 0)
    os.close(kept)
    os.close(lost)
    assert answer == ["allowed"] * 4 + ["EBADF"] * 2


def test_the_probe_reports_each_layer_for_doctor() -> None:
    layers = {layer.name: layer for layer in probe.probe()}
    assert set(layers) == {"namespaces", "landlock", "seccomp"}
    for layer in layers.values():
        assert layer.available or layer.remedy, "a missing layer names its remedy"
    assert layers["seccomp"].available
