"""A native module that was built from another source is told in a sentence, before anything misses
something.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import vswitch_native
from vswitchd import main
from vswitchd.rundir import StartError

needs_native = pytest.mark.skipif(
    not vswitch_native.AVAILABLE, reason=f"no native module: {vswitch_native.WHY}"
)


@needs_native
def test_the_module_here_has_all_that_its_stubs_declare() -> None:
    assert vswitch_native.outdated() == ""


@needs_native
def test_a_daemon_does_not_start_with_a_module_older_than_its_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vswitch_native.ring", SimpleNamespace(Ring=object))
    wanted = (
        r"the native module is older than this source: it lacks ring\.\w+(\.\w+)? and \d+ more; "
        "run `make native`, or start with --engine python"
    )
    with pytest.raises(StartError, match=wanted):
        main.config_of(main.parser().parse_args(["--run-dir", str(tmp_path), "--engine", "native"]))
    main.config_of(main.parser().parse_args(["--run-dir", str(tmp_path), "--engine", "python"]))
