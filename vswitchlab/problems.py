"""What is wrong with a lab file, in words to act on: where, which key, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LabFileError", "Problem", "did_you_mean", "dotted", "one_of"]

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """The key as people write it: `("guests", "a", "nics", 0, "mac")` is `guests.a.nics[0].mac`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def one_of(values: Iterable[str]) -> str:
    """`a, b or c`, in the order given."""
    names = list(values)
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "switch"?` where one known word is near, else an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `line` and `column` count from 1; `key` is empty where the whole file is meant."""

    file: str
    line: int
    column: int
    key: str
    what: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: "
        key = f"{self.key}: " if self.key else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{key}{self.what}{remedy}"


class LabFileError(ValueError):
    """A lab file that cannot be used; `problems` holds every mistake found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: (problem.line, problem.column))
        super().__init__("\n".join(str(problem) for problem in self.problems))
