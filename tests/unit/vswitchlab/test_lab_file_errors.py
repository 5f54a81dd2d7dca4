"""Every user mistake in errors/*.yaml gives exactly the message that stands beside it in errors/*.txt."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vswitchlab import LabFileError, load_file, resolve

ERRORS = Path(__file__).parent / "errors"
MISTAKES = sorted(ERRORS.glob("*.yaml"))


@pytest.mark.parametrize("file", MISTAKES, ids=lambda file: file.stem)
def test_mistake_gives_its_message(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ERRORS)
    with pytest.raises(LabFileError) as caught:
        resolve(load_file(file.name))
    assert f"{caught.value}\n" == file.with_suffix(".txt").read_text(encoding="utf-8")


def test_every_message_has_its_mistake_and_every_message_a_place() -> None:
    assert {file.stem for file in MISTAKES} == {file.stem for file in ERRORS.glob("*.txt")}
    for file in MISTAKES:
        for line in file.with_suffix(".txt").read_text(encoding="utf-8").splitlines():
            name, row, column, _ = line.split(":", 3)
            text = file.read_bytes().splitlines() or [b""]
            assert name == file.name
            assert 1 <= int(row) <= len(text)
            assert 1 <= int(column) <= len(text[int(row) - 1]) + 1


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(
        LabFileError,
        match=r"^/no/such\.yaml:1:1: cannot read the lab file: no such file or directory; check the path$",
    ):
        load_file("/no/such.yaml")


def test_a_folder_that_may_not_be_entered_is_a_problem_of_the_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "shut" / "vmlinuz"

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == kernel:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os.stat(path, follow_symlinks=follow_symlinks)

    file = tmp_path / "lab.yaml"
    file.write_text(f"guests:\n  a: {{kind: vm, kernel: {kernel}}}\n", encoding="utf-8")
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(LabFileError, match=r"vmlinuz cannot be looked at: permission denied; copy it"):
        resolve(load_file(file))


def test_a_file_larger_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(LabFileError, match="larger than 1 MiB"):
        load_file(file)
