"""`make hostile`: a payload that does harm at random runs as a guest, while others are watched.

    python -m tests.guests.hostile [--seconds 120] [--seed N] [-- PYTEST ARGUMENTS...]

The seed is printed; the same seed makes the payload take the same choices. Evidence and results are kept in
build/guests/hostile/.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys

from tests.guests import nested
from tests.guests import run as stock
from tests.guests.hostile.image import build
from tests.guests.packages import OUTPUT, GuestsUnavailable
from vswitch_native import vmm

FOLDER = OUTPUT / "hostile"
STARTING = 330
"""Seconds for everything around the payload's run, where all of it is emulated."""


def main() -> int:
    """The command line; 0 when nothing gave way."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.guests.hostile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="of harm (default 120)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: a random one")
    parser.add_argument("pytest", nargs="*", metavar="PYTEST ARGUMENT")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    print(f"hostile: seed {seed}, {options.seconds:g} s", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    try:
        if vmm.find() is None:
            raise GuestsUnavailable(f"vswitch-vmm is missing: {vmm.why()}")
        image = build(FOLDER)
        stock._compile()
        environment = {
            "VSWITCH_HOSTILE_IMAGE": str(image),
            "VSWITCH_HOSTILE_SECONDS": f"{options.seconds:g}",
            "VSWITCH_HOSTILE_SEED": str(seed),
            # Each plugin takes seconds to import where the processor is emulated.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        command = [
            *(sys.executable, "-m", "pytest", "tests/guests/hostile", "-s", "-p", "no:cacheprovider"),
            *("-p", "pytest_timeout", "--override-ini=addopts=-ra --strict-markers"),
            f"--timeout={options.seconds + STARTING:g}",
            f"--junitxml={FOLDER / 'tests.xml'}",
            *options.pytest,
        ]
        status = nested.run(
            command,
            timeout=options.seconds + STARTING + 30,
            environment=environment,
            console=FOLDER / "console-nested.log",
            tries=nested.TRIES,
        )
    except GuestsUnavailable as error:
        print(f"hostile: cannot run: {error}", file=sys.stderr)
        return 1
    print(f"hostile: {'nothing gave way' if status == 0 else 'FAILED'} (seed {seed}); evidence in {FOLDER}")
    return status


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
