"""Which layers of confinement this machine gives to this user, found by trying each in a short-lived child.

`python -m vswitch_confine.probe` prints the result as JSON; `probe()` runs that and is what `vswitch doctor`
and the extension host ask.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from vswitch_confine import landlock, limits, namespaces, seccomp
from vswitch_confine.errors import ConfinementRefused


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: `available`, what was found, and a one-line remedy when it is not available."""

    name: str
    available: bool
    detail: str
    remedy: str


def _try_namespaces() -> str:
    namespaces.unshare()
    child = os.fork()
    if child == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    _, status = os.waitpid(child, 0)
    return "user, PID, mount, network" if status == 0 else "the child was not PID 1"


def _try_landlock() -> str:
    limits.no_new_privileges()
    return f"ABI {landlock.restrict()}"


def _try_seccomp() -> str:
    limits.no_new_privileges()
    seccomp.restrict()
    return "filter installed"


_TRIALS: dict[str, Callable[[], str]] = {
    "namespaces": _try_namespaces,
    "landlock": _try_landlock,
    "seccomp": _try_seccomp,
}


def _in_child(name: str) -> Layer:
    """Run one trial in a forked child; the child's answer comes back through a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = ["ok", _TRIALS[name](), ""]
        except ConfinementRefused as error:
            answer = ["refused", str(error), error.remedy]
        except OSError as error:
            answer = ["refused", str(error), "see the message of the kernel"]
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    if not text:
        return Layer(
            name, False, "the trial process died without an answer", "look at the kernel's log (dmesg)"
        )
    outcome, detail, remedy = json.loads(text)
    return Layer(name, outcome == "ok", detail, remedy)


def probe(timeout: float = 20.0) -> list[Layer]:
    """Try every layer in processes of their own (safe in a threaded caller). `timeout` in seconds."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vswitch_confine.probe"],
        env=environment,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return [
            Layer(
                "probe", False, " ".join(last) or f"exit status {done.returncode}", "report this as a defect"
            )
        ]
    return [Layer(**entry) for entry in json.loads(done.stdout)]


def main() -> None:
    """Print the layers of this machine as a JSON list."""
    found = [_in_child(name) for name in _TRIALS]
    entries = [
        {"name": f.name, "available": f.available, "detail": f.detail, "remedy": f.remedy} for f in found
    ]
    sys.stdout.write(json.dumps(entries) + "\n")


if __name__ == "__main__":
    main()
