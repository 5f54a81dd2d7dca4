"""The fuzz targets' corpus, replayed; and damaged programs against the VMBus server of either engine."""

from __future__ import annotations

import random

import pytest

import vswitch_native
from vswitch_wire.engine import ENGINES, Engine

import targets  # isort: skip
import vmbus_server  # isort: skip


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_the_corpus_finds_nothing(name: str) -> None:
    target = targets.TARGETS[name]
    inputs = sorted(target.corpus.iterdir())
    assert len(inputs) > 3
    for path in inputs:
        target.run(path.read_bytes())


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_programs_break_no_rule_of_the_vmbus_server(engine: Engine) -> None:
    if engine == "native" and not vswitch_native.AVAILABLE:
        pytest.skip(vswitch_native.WHY)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    programs = [path.read_bytes() for path in sorted(targets.TARGETS["vmbus_server"].corpus.iterdir())]
    for _ in range(300):
        program = bytearray(b"".join(chance.choices(programs, k=chance.randint(1, 4))))
        for _ in range(chance.randint(0, 12)):
            program[chance.randrange(len(program))] = chance.randrange(256)
        vmbus_server.vmbus_server(bytes(program), engine)
