"""Every command and snippet that the documentation shows is run here, or by `.ci/run`."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.M | re.S)
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    if "node_modules" not in page.parts
)


def fences(language: str) -> list[tuple[str, str]]:
    """(page and number, text) of every fenced block in `language`."""
    found = []
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text()), 1):
            if match.group(1) == language:
                found.append((f"{page.relative_to(ROOT)}#{number}", match.group(2)))
    return found


def test_every_make_target_the_docs_name_is_run_by_ci() -> None:
    ci = (ROOT / ".ci/run").read_text()
    packaging = (ROOT / "tests/packaging/test_install.py").read_text()
    for place, text in fences("sh"):
        for line in text.splitlines():
            if line.startswith("make "):
                target = line.split()[1]
                assert f"make {target}" in ci or f'"{target}"' in packaging, f"{place}: nothing runs `{line}`"


@pytest.mark.parametrize(("place", "text"), fences("python"), ids=lambda value: str(value)[:60])
def test_python_snippets_run(place: str, text: str, tmp_path: Path) -> None:
    ast.parse(text, place)
    script = tmp_path / "snippet.py"
    script.write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, f"{place}:\n{done.stdout}{done.stderr}"


def vswitch_commands() -> list[tuple[str, list[str]]]:
    """(page and number, `vswitch ...` lines) of every block that has any."""
    blocks = [
        (place, [line for line in text.splitlines() if line.startswith("vswitch ")])
        for place, text in fences("sh")
    ]
    return [(place, commands) for place, commands in blocks if commands]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("place", "commands"), vswitch_commands(), ids=lambda value: str(value)[:60])
def test_vswitch_commands_run_in_the_order_shown(place: str, commands: list[str], tmp_path: Path) -> None:
    """`vswitch ...` lines of one block run one after the other against a daemon of their own."""
    environment = os.environ | {
        "VSWITCH_RUN_DIR": str(tmp_path / "run"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NO_COLOR": "1",
    }
    try:
        for command in commands:
            argv = shlex.split(command.split(" | ")[0], comments=True)
            done = subprocess.run(
                [sys.executable, "-m", "vswitchctl", *argv[1:]],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{place}: `{command}` said\n{done.stdout}{done.stderr}"
    finally:
        stop = [sys.executable, "-m", "vswitchctl", "daemon", "stop", "--stop-guests"]
        subprocess.run(stop, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
