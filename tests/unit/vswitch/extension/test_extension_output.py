"""What an extension prints is taken at a bounded rate: who floods waits, not the event loop."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

from vswitch.extension import process


async def test_an_extension_that_prints_without_end_gets_a_bounded_share_of_the_loop() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        child = subprocess.Popen(["yes"], stdout=subprocess.PIPE)  # noqa: ASYNC220
        flooding = process.ExtensionProcess(child, ours, "flood")
        seconds = 0.5
        await asyncio.sleep(seconds)
        taken = flooding._lines * 2
        child.kill()
        assert "was killed by SIGKILL" in await asyncio.wait_for(flooding.ended, 5)
    assert 0 < taken <= process.OUTPUT_BYTES * (seconds / process.OUTPUT_PAUSE + 2)


async def test_the_last_words_behind_a_flood_are_heard() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        code = "import sys; sys.stdout.write('x\\n' * 30000 + 'the last words'); sys.exit(3)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)  # noqa: ASYNC220
        ending = process.ExtensionProcess(child, ours, "talker")
        how = await asyncio.wait_for(ending.ended, 10)
    assert how == "ended with exit status 3; it said: the last words"
