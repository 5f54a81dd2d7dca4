"""Every lab in examples/labs comes up, its guests reach each other by name, and nothing is left of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vswitchctl.aio import AsyncClient
from vswitchlab import processes
from vswitchlab.pytest_plugin import LabFactory

ROOT = Path(__file__).parents[2]
LABS = sorted((ROOT / "examples" / "labs").glob("*.yaml"))

TELNET = """
import socket
try:
    socket.create_connection(("gate", 23), 0.5)
except TimeoutError:
    print("silence")
"""

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("file", LABS, ids=lambda file: file.stem)
def test_example_lab_runs(lab: LabFactory, file: Path) -> None:
    net = lab(file)
    partitions = {each.name.rsplit("/", 1)[1]: each for each in net.client.list_partitions()}
    assert sorted(partitions) == sorted(guest.name for guest in net.lab.guests)
    for source in net.lab.guests:
        said = net.run(source.name, ["cat", "/proc/sys/kernel/hostname"])
        assert said.stdout.decode().strip() == source.name
        for target in net.lab.guests:
            if source is not target:
                assert net.ping(source.name, target.name, count=3, interval=0.05) == 0
    inside = {processes.namespace(each.agent_pid, "net") for each in partitions.values()}
    pids = [each.pid for each in partitions.values()]
    lab.close()
    lab.labs.clear()
    assert not processes.alive(pids)
    assert not processes.members_of_namespaces(inside)


def test_full_form_forwards_between_its_switches_and_its_extension_drops_telnet(lab: LabFactory) -> None:
    net = lab(ROOT / "examples" / "labs" / "full-form.yaml")
    done = net.run("desk", ["python3", "-c", TELNET])
    assert done.stdout.strip() == b"silence", done
    assert net.drops()[net.port("desk")]["FILTERED"] >= 1
    assert net.ping("desk", "robot", count=3) == 0


def test_a_dict_is_a_lab_and_two_labs_can_be_up_at_once(lab: LabFactory) -> None:
    one = lab({"guests": ["a", "b"]}, name="one")
    two = lab({"switches": ["s1"], "guests": ["c", "d"]}, name="two")
    assert one.ping("a", "b") == 0
    assert two.ping("c", "d") == 0


async def test_a_command_that_ends_while_its_input_still_comes_gives_its_exit(lab: LabFactory) -> None:
    lab({"guests": ["a"]})

    async def one(client: AsyncClient, argv: list[str]) -> int:
        async with client.exec("a", argv) as command:
            for _ in range(3):
                await command.write(bytes(60_000))
            await command.close_stdin()
            async for _ in command:
                pass
        assert command.exit is not None
        return command.exit.status

    async with AsyncClient(lab.daemon.socket) as client:
        for _ in range(5):
            commands = [["sh", "-c", "exit 3"], ["true"], ["no-such-command"]]
            assert await asyncio.gather(*(one(client, each) for each in commands)) == [3, 0, 127]
