"""Where the daemon of this user lives: its run directory and its socket."""

from __future__ import annotations

import os
from pathlib import Path

SOCKET_NAME = "api.sock"


def default_run_dir() -> Path:
    """`$VSWITCH_RUN_DIR`, else `$XDG_RUNTIME_DIR/vswitch`, else `/tmp/vswitch-<uid>`."""
    if explicit := os.environ.get("VSWITCH_RUN_DIR"):
        return Path(explicit).absolute()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime).absolute() / "vswitch"
    return Path(f"/tmp/vswitch-{os.getuid()}")


def socket_path(run_dir: Path | None = None) -> Path:
    """`$VSWITCH_SOCKET` when no run directory is given, else the socket in that (or the default)
    directory.
    """
    if run_dir is None and (explicit := os.environ.get("VSWITCH_SOCKET")):
        return Path(explicit).absolute()
    return (run_dir or default_run_dir()) / SOCKET_NAME
