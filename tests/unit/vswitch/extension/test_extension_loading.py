"""What a file must be to be an extension, and the words that tell a user what is wrong with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from upcalls import RecordingStack, alive

from vswitch.extension.host import ExtensionHost, ExtensionLoadError
from vswitch.upcall import ExtensionChannel

PASS = "    def ingress(self, packet):\n        return packet.allow()\n"
IMPORT = "from vswitch.extension import Filter\n"


@pytest.fixture
async def host() -> AsyncIterator[ExtensionHost]:
    host = ExtensionHost(RecordingStack())
    yield host
    await host.close()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from vswitch.extension import Filter\nclass A(Filter)\n", "x.py:2: expected ':': class A(Filter)"),
        ("", "x.py defines no extension: write one class that derives from vswitch.extension.Filter"),
        (IMPORT + "class A:\n" + PASS, "x.py defines no extension"),
        (
            IMPORT + f"class A(Filter):\n{PASS}class B(Filter):\n{PASS}",
            "x.py defines 2 extensions (A, B): one file holds one",
        ),
        (
            IMPORT + "class A(Filter):\n    pass\n",
            "x.py: class A judges nothing: define ingress(self, packet) or egress(self, packet)",
        ),
        (
            "x = 1\ny = x / 0\n",
            "x.py:2: ZeroDivisionError: division by zero (while it was being loaded)",
        ),
        (
            IMPORT
            + f"class A(Filter):\n    def __init__(self):\n        self.t = open('/etc/shadow')\n{PASS}",
            "x.py:4: PermissionError: [Errno 13] Permission denied: '/etc/shadow'",
        ),
        ("import no_such_module\n", "x.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = '\0'\n", "x.py"),
        ("raise SystemExit(3)\n", "the process of extension x ended with exit status 1"),
        ("import os\nos._exit(7)\n", "the process of extension x ended with exit status 7"),
        ("print('hello')\nimport os, signal\nos.kill(os.getpid(), 9)\n", "x.py:3: PermissionError"),
        ("print('bye')\nimport ctypes\nctypes.string_at(0)\n", "was killed by SIGSEGV; it said: bye"),
    ],
    ids=[
        "syntax error",
        "empty",
        "no subclass",
        "two",
        "no method",
        "raises",
        "constructor raises",
        "import fails",
        "null byte",
        "system exit",
        "exits",
        "signals",
        "crashes",
    ],
)
async def test_a_file_that_is_no_extension_is_told_why_and_nothing_of_it_is_left(
    host: ExtensionHost, source: str, words: str
) -> None:
    with pytest.raises(ExtensionLoadError) as caught:
        await host.load("x", source.encode(), "x.py")
    assert words in str(caught.value)
    assert host.list() == []


async def test_a_file_that_never_finishes_loading_is_given_up_and_killed() -> None:
    host = ExtensionHost(RecordingStack(), load_timeout=1.0)
    with pytest.raises(ExtensionLoadError, match=r"x\.py was not loaded within 1 s: its top level"):
        await host.load("x", b"while True: pass\n", "x.py")
    assert host.list() == []


async def test_a_file_of_more_than_a_mebibyte_is_refused(host: ExtensionHost) -> None:
    with pytest.raises(ExtensionLoadError, match="an extension has at most 1048576"):
        await host.load("x", b"#" * (1 << 20) + b"\n", "x.py")


async def test_a_base_class_of_its_own_in_the_file_is_no_second_extension(host: ExtensionHost) -> None:
    source = IMPORT + f"class Base(Filter):\n{PASS}class Own(Base):\n    pass\n"
    info = await host.load("x", source.encode(), "x.py")
    assert (info.class_name, info.passes) == ("Own", ("ingress",))


async def test_a_name_is_taken_once(host: ExtensionHost) -> None:
    source = (IMPORT + "class A(Filter):\n" + PASS).encode()
    await host.load("x", source, "x.py")
    with pytest.raises(ValueError, match="extension x is loaded already; unload it first"):
        await host.load("x", source, "x.py")


async def test_unloading_what_is_not_loaded_names_what_is(host: ExtensionHost) -> None:
    await host.load("x", (IMPORT + "class A(Filter):\n" + PASS).encode(), "x.py")
    with pytest.raises(KeyError, match="extension y is not loaded; loaded are: x"):
        await host.unload("y")


async def test_after_unload_the_process_is_gone_and_its_name_is_free(host: ExtensionHost) -> None:
    source = (IMPORT + "class A(Filter):\n" + PASS).encode()
    pid = (await host.load("x", source, "x.py")).pid
    assert alive(pid)
    await host.unload("x")
    assert not alive(pid)
    assert host.list() == []
    await host.load("x", source, "x.py")


async def test_extensions_keep_the_order_in_which_they_were_loaded(host: ExtensionHost) -> None:
    source = (IMPORT + "class A(Filter):\n" + PASS).encode()
    for name in ("c", "a", "b"):
        await host.load(name, source, "x.py")
    assert [info.name for info in host.list()] == ["c", "a", "b"]


class RefusingStack(RecordingStack):
    """A datapath that cannot take another extension."""

    refuses = False

    async def set_extensions(self, channels: Iterable[ExtensionChannel]) -> None:
        if self.refuses:
            raise OSError(24, "Too many open files")
        await super().set_extensions(channels)


def children() -> set[str]:
    """Processes that this one started."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


async def test_an_extension_that_the_datapath_does_not_take_leaves_no_process_and_no_trace() -> None:
    stack = RefusingStack()
    host = ExtensionHost(stack)
    source = (IMPORT + "class A(Filter):\n" + PASS).encode()
    before = await host.load("one", source, "one.py")
    stack.refuses = True
    running = children()
    with pytest.raises(OSError, match="Too many open files"):
        await host.load("two", source, "two.py")
    with pytest.raises(OSError, match="Too many open files"):
        await host.set_on_failure("one", "closed")
    assert children() == running
    assert host.list() == [before]
    stack.refuses = False
    await host.close()
