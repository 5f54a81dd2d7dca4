"""A virtual machine of ours beside a hypervisor in this process, without the daemon.

    python -m tests.guests.vmm KERNEL INITRD [--cmdline TEXT] [--cpus N] [--seconds N]

boots one with a NIC on a switch and prints its console; what is typed goes to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from hypervisor import Hypervisor, Partition
from netvsp.nic import SyntheticNic
from vswitch import Switch
from vswitch_native import vmm

DEFAULT_CMDLINE = "console=ttyS0 quiet panic=-1 rdinit=/sbin/init"


@dataclass
class Machine:
    """A running VMM, its partition and its console socket."""

    partition: Partition
    process: asyncio.subprocess.Process
    console: Path
    log: Path

    async def ended(self, seconds: float) -> int:
        """The VMM's exit status."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()


@asynccontextmanager
async def machine(
    partition: Partition,
    directory: Path,
    kernel: Path,
    initrd: Path | None,
    cmdline: str = DEFAULT_CMDLINE,
    options: Sequence[str] = (),
) -> AsyncIterator[Machine]:
    """Starts the partition's VMM and attaches; it is killed at the end if it still runs."""
    program = vmm.find()
    assert program is not None, vmm.why()
    console_path = directory / f"{partition.name}.console"
    log = directory / f"{partition.name}.log"
    door = partition.listen()
    console = socket.socket(socket.AF_UNIX)
    console.bind(str(console_path))
    console.listen(4)
    files = {"--kernel-fd": os.open(kernel, os.O_RDONLY), "--console-fd": console.detach()}
    if initrd is not None:
        files["--initrd-fd"] = os.open(initrd, os.O_RDONLY)
    arguments = [str(part) for pair in files.items() for part in pair]
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(str(program), *arguments, "--cmdline", cmdline, "--name", partition.name, *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[door, *files.values()],
            env={"VSWITCH_DOOR_FD": str(door), "RUST_BACKTRACE": "1"},
            cwd="/",
        )
    for fd in (door, *files.values()):
        os.close(fd)
    try:
        await partition.attach(timeout=30)
        yield Machine(partition, process, console_path, log)
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace")[-3000:])
        raise
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _relay(path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    loop = asyncio.get_running_loop()
    if sys.stdin.isatty():
        loop.add_reader(0, lambda: writer.write(os.read(0, 1024)))
    while data := await reader.read(4096):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


async def main() -> int:
    """Boots one machine and prints what it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.guests.vmm")
    parser.add_argument("kernel", type=Path)
    parser.add_argument("initrd", type=Path, nargs="?")
    parser.add_argument("--cmdline", default=DEFAULT_CMDLINE)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        hypervisor = Hypervisor(engine="native", run_dir=directory / "run")
        switch = Switch("s0", engine="native")
        partition = await hypervisor.create_partition(
            "vm", memory_bytes=options.memory << 20, vp_count=options.cpus
        )
        nic = SyntheticNic(
            "vm-eth0", bytes.fromhex("02155d000001"), UUID(int=0xF01), switch.add_port("vm"), engine="native"
        )
        await partition.vmbus.offer(nic)
        partition.on_reset.append(lambda: print("\r\nthe guest starts anew\r", flush=True))
        status = -1
        with contextlib.suppress(TimeoutError):
            async with machine(
                partition, directory, options.kernel, options.initrd, options.cmdline
            ) as running:
                relay = asyncio.create_task(_relay(running.console))
                try:
                    status = await running.ended(options.seconds)
                finally:
                    await asyncio.sleep(0.1)
                    relay.cancel()
                    print(f"\r\nthe VMM ended with {status}; VMBus: {partition.vmbus.connection}")
        await hypervisor.close()
        await switch.close()
        return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
