"""Debian packages through apt, with an index of our own: signed, checked, nothing installed, no root needed.

apt verifies the signature of a suite's release file and the hashes below it; what is unpacked is
hashed once more against the index, so that a file that changed in the cache is found too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "guests"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"


class GuestsUnavailable(Exception):
    """This machine cannot make or boot stock guests; the text says what is missing and how to get it."""


def cache() -> Path:
    """Where downloads and images are kept; VSWITCH_GUESTS_CACHE shares one between checkouts."""
    return Path(os.environ.get("VSWITCH_GUESTS_CACHE") or OUTPUT / "cache")


@dataclass(frozen=True)
class Package:
    """One package of the index: what the signed index says about it."""

    name: str
    version: str
    suite: str
    sha256: str
    depends: str


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two runs that share a cache fill it one after the other."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses, or the project-wide one."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    return next((site for site in found if site.rstrip("/").endswith("/debian")), MIRROR)


class Suite:
    """One suite of Debian (bookworm, trixie, ...) with its own apt state under the cache."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._home = cache() / "apt" / name
        self._index = self._home / "packages.json"

    def _apt(self, *command: str) -> str:
        """Runs apt on this suite's own state; its output, or an error in words."""
        home = self._home
        options = {
            "Dir::State": home / "state",
            "Dir::State::status": home / "status",
            "Dir::Cache": home / "cache",
            "Dir::Etc::sourcelist": home / "sources.list",
            "Dir::Etc::sourceparts": home / "none",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            # The index and the packages lie below this directory, which apt's own user cannot always enter.
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        words = [command[0], *(f"-o{name}={value}" for name, value in options.items()), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=home)
        if done.returncode:
            raise GuestsUnavailable(
                f"{' '.join(command)} for Debian {self.name}: {done.stderr.strip()[-600:]}"
            )
        return done.stdout

    def refresh(self) -> None:
        """Fetches the suite's index anew; apt checks its signature."""
        if not shutil.which("apt-get"):
            raise GuestsUnavailable(
                "stock kernels are fetched with apt-get, which this machine does not have"
            )
        if not KEYRING.exists():
            raise GuestsUnavailable(f"{KEYRING} is missing: apt install debian-archive-keyring")
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self._home / part).mkdir(parents=True, exist_ok=True)
        (self._home / "status").touch()
        (self._home / "sources.list").write_text(
            f"deb [arch=amd64 target=Packages signed-by={KEYRING}] {_mirror()} {self.name} main\n"
        )
        self._apt("apt-get", "update", "-q")

    def find(self, name: str) -> Package:
        """The package `name` as the signed index has it; what was found once stays until `forget`."""
        with _locked(self._home):
            known: dict[str, dict[str, str]] = (
                json.loads(self._index.read_text()) if self._index.exists() else {}
            )
            if name not in known:
                if not (self._home / "sources.list").exists():
                    self.refresh()
                said = self._apt("apt-cache", "show", "--no-all-versions", name)
                fields = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line[1:])
                package = Package(
                    name, fields["Version"], self.name, fields["SHA256"], fields.get("Depends", "")
                )
                known[name] = asdict(package)
                self._index.write_text(json.dumps(known, indent=1))
        return Package(**known[name])

    def unpacked(self, package: Package) -> Path:
        """The package's files in a folder of their own, fetched when needed and checked against the index."""
        store = cache() / "packages"
        folder = store / f"{package.name}_{package.version}".replace(":", "-")
        with _locked(store):
            if not folder.is_dir():
                archive = self._download(package, store)
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                subprocess.run(["dpkg-deb", "--extract", archive, partial], check=True)
                subprocess.run(["dpkg-deb", "--control", archive, partial / "DEBIAN"], check=True)
                partial.rename(folder)
        return folder

    def _download(self, package: Package, store: Path) -> Path:
        """The .deb itself; refuses one whose hash is not the index's."""
        archive = store / f"{package.name}_{package.version}_{package.sha256[:12]}.deb".replace(":", "-")
        if not archive.exists():
            self._apt("apt-get", "download", "-q", f"{package.name}={package.version}")
            fetched = next(self._home.glob(f"{package.name}_*.deb"))
            fetched.rename(archive)
        if sha256(archive) != package.sha256:
            archive.unlink()
            raise GuestsUnavailable(
                f"{archive.name} is not the file that Debian {self.name} signed; try again"
            )
        return archive
