"""A port watched while it works, with asyncio: a capture, a watch and a ping at the same time.

Needs a daemon: `vswitch daemon start`. Writes `ping.pcapng` into the current directory.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from vswitchctl.aio import AsyncClient

PING = [sys.executable, "-m", "netvsc.probe", "ping", "10.9.1.2", "--count", "5", "--interval", "0.1"]


async def follow(vswitch: AsyncClient, synced: asyncio.Event) -> None:
    """Prints what happens to this example's resources."""
    async for response in vswitch.watch(["switches/live", "partitions/live"]):
        kind = response.WhichOneof("message")
        if kind == "synced":
            synced.set()
        elif kind == "change":
            print(f"changed: {response.change.name}")
        elif kind == "event":
            print(f"event: {response.event.kind} {response.event.resource}: {response.event.text}")


async def start_guest(vswitch: AsyncClient, number: int) -> None:
    name = f"live{number}"
    await vswitch.create_partition(name)
    await vswitch.create_nic(f"{name}/eth0", port=f"live/{name}", addresses=[f"10.9.1.{number}/24"])
    await vswitch.start_partition(name)


async def main() -> int:
    async with AsyncClient() as vswitch:
        synced = asyncio.Event()
        following = asyncio.create_task(follow(vswitch, synced))
        await synced.wait()
        await vswitch.create_switch("live")
        try:
            # Both at once: a start takes as long as the slower one.
            await asyncio.gather(start_guest(vswitch, 1), start_guest(vswitch, 2))
            async with vswitch.capture("switches/live/ports/live1") as capture:
                ping = await vswitch.run_in("live1", PING, timeout=30)
                await vswitch.stop_capture(capture.capture.name)
                pieces = [piece async for piece in capture]
            await asyncio.to_thread(Path("ping.pcapng").write_bytes, b"".join(pieces))
            print(f"{capture.capture.packets} packets; look with: vswitch capture show ping.pcapng")
        finally:
            for number in (1, 2):
                await vswitch.delete_partition(f"live{number}", force=True)
            await vswitch.delete_switch("live", force=True)
            following.cancel()
        return 0 if ping.ok else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
