"""The published JSON Schema of lab files (lab.schema.json, draft 2020-12), and its errors in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from vswitchlab.problems import LabFileError, Path, Problem, did_you_mean, one_of
from vswitchlab.source import Source

__all__ = ["check", "schema", "schema_text"]

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "nothing",
}


@cache
def schema_text() -> str:
    """The schema as published."""
    return resources.files("vswitchlab.schema").joinpath("lab.schema.json").read_text(encoding="utf-8")


@cache
def schema() -> dict[str, Any]:
    """The schema as a value; do not change it."""
    value: dict[str, Any] = json.loads(schema_text())
    return value


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


def check(source: Source) -> None:
    """Holds a lab file to the schema. Raises LabFileError with every problem found (at most 20)."""
    problems: list[Problem] = []
    for error in _validator().iter_errors(source.value):
        if error.validator == "required" and _misspelt(error):
            continue
        for problem in _explain(source, error):
            if problem not in problems:
                problems.append(problem)
        if len(problems) >= 20:
            break
    if problems:
        raise LabFileError(problems)


def _part(error: ValidationError) -> dict[str, Any]:
    return cast("dict[str, Any]", error.schema)


def _limit(error: ValidationError) -> Any:
    return error.validator_value


def _instance(error: ValidationError) -> Any:
    return error.instance


def _misspelt(error: ValidationError) -> bool:
    """A key is missing because it is there under a wrong name; the unknown key's own message says so."""
    known = _part(error)["properties"]
    missing = next(key for key in _limit(error) if key not in _instance(error))
    unknown = (key for key in _instance(error) if key not in known)
    return any(did_you_mean(key, known) == did_you_mean(missing, [missing]) for key in unknown)


def _explain(source: Source, error: ValidationError) -> Iterator[Problem]:
    path: Path = tuple(error.absolute_path)
    keyword = str(error.validator)
    value = _instance(error)
    if keyword == "anyOf":
        yield from _explain_choice(source, error, path)
    elif keyword == "additionalProperties":
        allowed = sorted(_part(error)["properties"])
        for key in sorted(set(value) - set(allowed)):
            guess = did_you_mean(key, allowed)
            yield source.problem((*path, key), f'unknown key "{key}"; allowed: {", ".join(allowed)}', guess)
    elif keyword == "required":
        missing = next(key for key in _limit(error) if key not in value)
        yield source.problem(
            path,
            f'the key "{missing}" is missing',
            _remedy(_part(error)["properties"][missing]),
            at_value=True,
        )
    elif keyword in ("pattern", "maxLength"):
        if "propertyNames" in error.absolute_schema_path:
            yield source.problem(
                (*path, str(value)), f"{_shown(value)} is not {_part(error)['title']}", _remedy(_part(error))
            )
            return
        yield source.problem(
            path, f"{_shown(value)} is not {_part(error)['title']}", _remedy(_part(error)), at_value=True
        )
    elif keyword == "enum":
        names = [str(name) for name in _limit(error)]
        guess = did_you_mean(str(value), names)
        yield source.problem(
            path, f"{_shown(value)} is not allowed; allowed: {one_of(names)}", guess, at_value=True
        )
    elif keyword == "type":
        wanted = _limit(error) if isinstance(_limit(error), list) else [_limit(error)]
        title = _part(error).get("title") or one_of(_TYPES[name] for name in wanted)
        yield source.problem(
            path, f"must be {title}, not {_kind(value)}", _remedy(_part(error)), at_value=True
        )
    elif keyword in ("minimum", "maximum"):
        low, high = _part(error)["minimum"], _part(error)["maximum"]
        yield source.problem(
            path, f"{value} is out of range; allowed: {low} to {high}", _remedy(_part(error)), at_value=True
        )
    elif keyword in ("minItems", "minProperties"):
        yield source.problem(path, "is empty", _remedy(_part(error)), at_value=True)
    elif keyword in ("maxItems", "maxProperties"):
        what = f"has {len(value)} entries; at most {_limit(error)} are allowed"
        yield source.problem(path, what, _remedy(_part(error)), at_value=True)
    elif keyword == "uniqueItems":
        twice = next(item for index, item in enumerate(value) if item in value[:index])
        last = len(value) - 1 - value[::-1].index(twice)
        yield source.problem((*path, last), f"{_shown(twice)} is listed twice", "keep one", at_value=True)
    else:
        yield source.problem(path, error.message, _remedy(_part(error)), at_value=True)


def _explain_choice(source: Source, error: ValidationError, path: Path) -> Iterator[Problem]:
    """Of several allowed shapes, the one whose type fits is what the user meant; its errors are shown."""
    branches: dict[int, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(int(inner.schema_path[0]), []).append(inner)
    for errors in branches.values():
        if not any(str(inner.validator) == "type" and not inner.path for inner in errors):
            for inner in errors:
                yield from _explain(source, inner)
            return
    what = f"must be {_part(error)['title']}, not {_kind(_instance(error))}"
    yield source.problem(path, what, _remedy(_part(error)), at_value=True)


def _remedy(part: dict[str, Any]) -> str:
    examples = part.get("examples")
    if not examples:
        return ""
    return f"for example {json.dumps(examples[0]) if not isinstance(examples[0], str) else examples[0]}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float | str):
        hint = "" if isinstance(value, str) else " (quote it if it is text)"
        return f"{_shown(value)}{hint}"
    return "a mapping" if isinstance(value, dict) else "a list"
