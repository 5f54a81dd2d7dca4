"""Fuzzes the Python targets, one per processor at a time; prints executions and seeds; fails on a finding.

    python tests/fuzz/run.py [SECONDS [TARGET...]]

SECONDS (60) is what the stateful target gets; parsers get a quarter of it. A finding stays in
`tests/fuzz/findings/`; `python tests/fuzz/run.py --one TARGET FILE` runs it again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FINDINGS = HERE / "findings"


def main(arguments: list[str]) -> int:
    """The command line; 0 when nothing was found."""
    if arguments[:1] == ["--one"]:
        return _one(arguments[1], arguments[2:])
    if importlib.util.find_spec("atheris") is None:
        print(
            "fuzz: the Python targets are not run: atheris is not installed (it has wheels for CPython on"
            " x86-64 Linux alone; pip install 'vswitch[dev]'). Their corpus is replayed by pytest."
        )
        return 0
    sys.path[:0] = [str(ROOT), str(HERE)]
    from targets import TARGETS

    seconds = float(arguments[0]) if arguments else 60.0
    names = arguments[1:] or list(TARGETS)
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = [
            pool.submit(_fuzz, name, max(1, round(seconds * TARGETS[name].share)), Path(work))
            for name in names
        ]
        return 0 if all(result.result() for result in results) else 1


def _fuzz(name: str, seconds: int, work: Path) -> bool:
    """One target in a process of its own. New inputs go to a directory of this run."""
    fresh = work / name
    fresh.mkdir()
    FINDINGS.mkdir(exist_ok=True)
    seed = int.from_bytes(os.urandom(4), "little") | 1
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--one", name, str(fresh)),
            *(f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={FINDINGS / name}-"),
            *("-timeout=10", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        cwd=ROOT,
    )
    took = time.monotonic() - began
    runs = re.findall(r"Done (\d+) runs|stat::number_of_executed_units: *(\d+)", done.stdout)
    executed = max((int(a or b) for a, b in runs), default=0)
    edges = (re.findall(r"cov: (\d+)", done.stdout) or ["0"])[-1]
    if done.returncode == 0 and executed:
        print(
            f"fuzz python {name}: {executed} executions in {took:.0f} s, {edges} edges,"
            f" seed {seed}, no finding",
            flush=True,
        )
        return True
    tail = "\n".join(done.stdout.splitlines()[-60:])
    print(f"fuzz python {name}: FAILED with seed {seed}, status {done.returncode}\n{tail}", flush=True)
    return False


def _one(name: str, rest: list[str]) -> int:
    """The process of one target: its imports are instrumented, then libFuzzer takes over."""
    import atheris

    sys.path[:0] = [str(ROOT), str(HERE)]
    with atheris.instrument_imports(include=["hypervisor", "netvsp", "vswitch_wire"]):
        from targets import TARGETS

        target = TARGETS[name]
    single = [part for part in rest if not part.startswith("-")]
    corpus = [] if single and Path(single[0]).is_file() else [str(target.corpus)]
    atheris.Setup([name, *rest, *corpus], target.run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
