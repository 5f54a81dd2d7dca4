"""What the kernel says of a VMM that runs a stock guest: of no use to a guest that broke out into it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.guests.inside.world import VM1, World


def _status(path: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in (path / "status").read_text().splitlines())
    return {key: value.strip() for key, _, value in lines}


def test_every_thread_of_the_vmm_is_without_privileges_and_behind_a_filter(world: World) -> None:
    pid = world.client.get_partition(VM1.name).agent_pid
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir())
    assert len(tasks) > VM1.cpus
    for task in tasks:
        status = _status(task)
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1"), task
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0, (task, name)


def test_the_vmm_lives_in_namespaces_of_its_own(world: World) -> None:
    partition = world.client.get_partition(VM1.name)
    for kind in ("user", "pid", "mnt", "net", "ipc", "uts"):
        inside = os.stat(f"/proc/{partition.agent_pid}/ns/{kind}").st_ino
        assert inside != os.stat(f"/proc/self/ns/{kind}").st_ino, kind
    assert _status(Path(f"/proc/{partition.agent_pid}"))["NSpid"].split()[-1] == "1"
    # The daemon's run directory, with its API and every other guest's door, is empty inside.
    assert os.listdir(f"/proc/{partition.agent_pid}/root{world.run_dir}") == []
