"""What a stranger finds: READMEs, links that lead somewhere, the licence, skips with their reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
CRATES = sorted(path.parent for path in ROOT.glob("native/*/Cargo.toml"))
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)\)")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(path / "README.md" for path in PACKAGES + CRATES)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", PACKAGES + CRATES, ids=name)
def test_every_package_and_crate_has_a_readme(folder: Path) -> None:
    assert len((folder / "README.md").read_text().split()) > 20


def test_the_readme_has_two_commands_a_picture_and_what_is_not_there_yet() -> None:
    text = (ROOT / "README.md").read_text()
    first = re.search(r"```sh\n(.*?)```", text, re.S)
    assert first is not None
    assert first[1].split("\n") == ["make demo", "make test", ""]
    assert "┌──" in text
    for heading in ("What it is", "What is not there yet"):
        assert f"\n## {heading}\n" in text


def test_the_licence_is_mit() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "MIT"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_every_file_and_folder_that_the_architecture_names_is_there() -> None:
    for word in re.findall(r"`([^`\s]+/[^`\s]*)`", (ROOT / "docs/architecture.md").read_text()):
        if "<" in word or word.startswith(("/", "$")):
            continue
        stem, braces, rest = word.partition("{")
        parts = [stem + each for each in rest.rstrip("}.py").split(",")] if braces else [word.rstrip("/")]
        for part in parts:
            found = list(ROOT.glob(part)) or list(ROOT.glob(f"{part}.py"))
            assert found, f"docs/architecture.md names {part}"


def test_skipped_tests_are_printed_with_their_reason() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-ra" in options["addopts"].split()
