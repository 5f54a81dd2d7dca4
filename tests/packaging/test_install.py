"""Installing as a newcomer would: a wheel without cargo, a tree without cargo, as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

pytestmark = pytest.mark.timeout(900)


@dataclass
class Newcomer:
    """An ordinary user with a home directory of his own, no capability, and no cargo on his PATH."""

    home: Path

    def run(self, *argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command as that user; output is captured as text (stdout and stderr together)."""
        command: Sequence[str] = [str(arg) for arg in argv]
        if os.geteuid() == 0:
            drop = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--bounding-set=-all"]
            command = ["setpriv", *drop, *command]
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", "TERM": "dumb", "LANG": "C.UTF-8"}
        environment |= {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_proxy")}
        done = subprocess.run(
            command, cwd=self.home, env=environment, text=True, timeout=600, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
        return done

    def own(self, path: Path) -> None:
        """Gives a tree to the user."""
        if os.geteuid() == 0:
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(path)], check=True)


@pytest.fixture
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    # Not below pytest's own directory: that one is closed to other users.
    home = Path("/tmp") / f"vswitch-newcomer-{os.getpid()}-{tmp_path_factory.mktemp('n').name}"
    home.mkdir(mode=0o755)
    user = Newcomer(home)
    user.own(home)
    yield user
    shutil.rmtree(home, ignore_errors=True)


def readable_python() -> str:
    """A Python >= 3.11 that another user may run."""
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable):
        probe = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
        if Path(candidate).exists() and subprocess.run([candidate, "-c", probe], check=False).returncode == 0:
            return candidate
    pytest.fail("no Python >= 3.11 with venv outside this user's home (Debian: apt install python3-venv)")


def source_copy(destination: Path) -> None:
    """What `git clone` would give: the tracked and untracked, not the ignored, files."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            target = destination / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


def test_wheel_installs_for_an_ordinary_user_without_cargo_and_runs_the_demo(
    newcomer: Newcomer, tmp_path: Path
) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=600)
    (wheel,) = tmp_path.glob("vswitch-*.whl")
    assert "abi3" in wheel.name, f"{wheel.name} is bound to one Python version or lacks the native module"
    handed = newcomer.home / wheel.name
    shutil.copy(wheel, handed)
    newcomer.own(handed)
    newcomer.run(readable_python(), "-m", "venv", "env")
    newcomer.run("env/bin/pip", "install", "--quiet", handed)
    demo = newcomer.run("env/bin/vswitch", "demo")
    last = demo.stdout.strip().splitlines()[-1]
    assert last.startswith("demo: "), demo.stdout
    assert last.endswith("0 failed (guests: netns, engine: native)"), demo.stdout


def test_source_tree_installs_without_cargo_and_says_once_what_is_missing(newcomer: Newcomer) -> None:
    tree = newcomer.home / "vswitch"
    source_copy(tree)
    newcomer.own(tree)
    demo = newcomer.run("make", "-C", tree, "demo", f"PYTHON={readable_python()}")
    runs_the_python_engine_and_says_so_once(demo.stdout)


def runs_the_python_engine_and_says_so_once(output: str) -> None:
    """What is missing, what it costs and what mends it, once; then the demo without a failure."""
    assert output.count("the native module is not built") == 1, output
    assert (
        output.count("the Python engine runs: everything works, packets cost about a hundred times more CPU")
        == 1
    ), output
    assert "remedy: " in output, output
    verdict = [line for line in output.splitlines() if line.startswith("demo: ")][-1]
    assert verdict.endswith("0 failed (guests: netns, engine: python)"), output


def test_where_no_crate_registry_is_in_reach_make_demo_still_works(tmp_path: Path) -> None:
    """cargo is there, but neither a registry nor anything that it has fetched before."""
    if shutil.which("cargo") is None:
        pytest.skip("no cargo: the test without cargo is this one")
    tree = tmp_path / "vswitch"
    source_copy(tree)
    empty = tmp_path / "cargo-home"
    empty.mkdir()
    environment = os.environ | {"CARGO_HOME": str(empty), "CARGO_NET_OFFLINE": "true"}
    demo = subprocess.run(
        ["make", "-C", str(tree), "demo", f"PYTHON={sys.executable}"],
        env=environment, text=True, timeout=600, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert demo.returncode == 0, demo.stdout
    runs_the_python_engine_and_says_so_once(demo.stdout)
