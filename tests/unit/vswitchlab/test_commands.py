"""The lab commands that need no daemon: validate, graph, schema, and how mistakes end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from vswitchlab.app import lab_app
from vswitchlab.schema import schema

ROOT = Path(__file__).parents[3]


def lab(*words: str) -> Result:
    return CliRunner().invoke(lab_app, list(words))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "two.lab.yaml"
    file.write_text("guests: [a, b]\n", encoding="utf-8")
    return file


def test_validate_says_what_the_lab_is_and_what_comes_next(two: Path) -> None:
    result = lab("validate", "two.lab.yaml")
    assert result.exit_code == 0
    assert result.stdout == (
        "two.lab.yaml is a valid lab: two, 1 switch, 2 guests, 2 NICs\nnext: vswitch lab up two.lab.yaml\n"
    )


def test_validate_as_yaml_is_a_lab_file_with_every_default(two: Path) -> None:
    value = yaml.safe_load(lab("validate", "-o", "yaml").stdout)
    assert value["guests"]["b"]["nics"][0]["addresses"] == ["10.77.0.2/24", "fd77::2/64"]


def test_the_only_lab_file_here_is_found(two: Path) -> None:
    assert lab("validate").exit_code == 0
    (two.parent / "lab.yaml").write_text("guests: [c]\n", encoding="utf-8")
    result = lab("validate")
    assert result.exit_code == 2
    assert "there are several here: lab.yaml, two.lab.yaml" in result.stderr


def test_without_a_lab_file_the_remedy_is_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lab("up")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: which lab file? there is none here\nremedy: name it: vswitch lab up FILE\n"
    )


def test_a_mistake_ends_with_status_2_and_names_its_place(two: Path) -> None:
    two.write_text("guests: [a, b]\nengin: native\n", encoding="utf-8")
    result = lab("up", "two.lab.yaml")
    assert result.exit_code == 2
    assert result.stderr == (
        'two.lab.yaml:2:1: engin: unknown key "engin"; allowed: engine, guests, name, switches; '
        'did you mean "engine"?\n'
    )


def test_graph_as_text(two: Path) -> None:
    assert lab("graph").stdout == (
        "lab two\n\n[s0]  10.77.0.0/24, fd77::/64\n"
        " ├── a eth0  10.77.0.1/24 fd77::1/64\n"
        " └── b eth0  10.77.0.2/24 fd77::2/64\n"
    )


def test_graph_as_mermaid(two: Path) -> None:
    lines = lab("graph", "--format", "mermaid").stdout.splitlines()
    assert lines[0] == "graph LR"
    assert '  switch_s0[["s0"]]' in lines
    assert '  guest_a ---|"eth0<br/>10.77.0.1/24<br/>fd77::1/64"| switch_s0' in lines


def test_schema_is_printed_as_published(two: Path) -> None:
    assert json.loads(lab("schema").stdout) == schema()


def test_down_without_a_daemon_says_so(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWITCH_RUN_DIR", str(two.parent / "run"))
    result = lab("down")
    assert result.exit_code == 1
    assert "error: no vswitch daemon answers at" in result.stderr
    assert "remedy: " in result.stderr
