"""Files that a lab file names."""

from __future__ import annotations

from pathlib import Path

from vswitchlab.problems import did_you_mean

__all__ = ["problem"]


def problem(file: Path, suffix: str = "") -> tuple[str, str] | None:
    """What keeps a file from being used and what to do, None for a good one. `suffix`: of those proposed."""
    try:
        if file.is_file():
            return None
        names = [each.name for each in file.parent.glob(f"*{suffix}")]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return f"{file} cannot be looked at: {reason}", "copy it to a folder of your own"
    return f"there is no file {file}", did_you_mean(
        file.name, names
    ) or "paths are seen from the lab file's folder"
