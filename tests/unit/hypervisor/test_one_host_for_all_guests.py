"""What serves guests does not know what kind of guest it serves: in Python by name (imports are the import
linter's), in Rust by dependency.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KINDS = re.compile(r"kvm|netns|vmm\b|backend_?kind|is_process|is_vm\b", re.IGNORECASE)
GUESTS = {"vswitch-vmm", "vswitch-netvsc"}
SERVES = ("hypervisor", "netvsp", "vswitch")
SERVING_CRATES = ("door", "epoch", "memory", "netvsp", "ring", "switch", "wire")


def words(tree: ast.Module) -> Iterator[str]:
    """Every name and every text of a module but its docstrings."""
    texts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.name


@pytest.mark.parametrize("package", SERVES)
def test_no_module_names_a_kind_of_guest(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        (str(path.relative_to(ROOT)), word)
        for path in files
        for word in words(ast.parse(path.read_text(encoding="utf-8")))
        if KINDS.search(word)
    }
    assert not found


@pytest.mark.parametrize("crate", SERVING_CRATES)
def test_no_crate_that_serves_guests_depends_on_one_that_is_a_guest(crate: str) -> None:
    manifest = tomllib.loads((ROOT / "native" / crate / "Cargo.toml").read_text(encoding="utf-8"))
    sections = ("dependencies", "build-dependencies", "dev-dependencies")
    named = {name for section in sections for name in manifest.get(section, {})}
    assert not named & GUESTS


def test_the_words_looked_for_are_found_where_they_are() -> None:
    source = '"""kvm in a docstring"""\nif partition.is_vm:\n    use("netns")\n'
    assert {word for word in words(ast.parse(source)) if KINDS.search(word)} == {"netns", "is_vm"}
