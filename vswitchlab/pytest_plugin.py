"""pytest plugin: the `lab` fixture brings up a lab file, or a dict, on a daemon of its own.

    def test_ping(lab):
        net = lab({"guests": ["a", "b"]})
        assert net.ping("a", "b") == 0          # packets lost

Every lab's switches are captured while it is up; when the test fails, its report gets the last packets (drops
with their reason), the drop counters of every port and the path of the whole capture. Labs go when the test
ends, the daemon when the session ends. `--vswitch-engine` chooses the engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from vswitchctl.aio import CompletedExec
    from vswitchctl.client import Client
    from vswitchctl.launch import DaemonProcess
    from vswitchlab.topology import Lab

__all__ = ["LabFactory", "TestLab", "lab", "vswitch_daemon"]

T = TypeVar("T")

PACKETS_SHOWN = 40


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vswitch")
    group.addoption("--vswitch-engine", choices=("native", "python"), help="engine of the labs' daemon")


class TestLab:
    """A lab that is up. `client` is the synchronous client of its daemon."""

    __test__ = False  # not a class of tests

    def __init__(self, lab: Lab, client: Client, directory: Path) -> None:
        self.lab = lab
        self.client = client
        self.capture_file = directory / f"{lab.name}.pcapng"
        self._armed = threading.Event()
        self._capture_name = ""
        self._capture_fault = ""
        self._recorder = threading.Thread(target=self._record, name=f"capture {lab.name}", daemon=True)
        self._recorder.start()
        self._armed.wait(10)

    def run(self, guest: str, argv: Sequence[str], *, timeout: float = 30.0) -> CompletedExec:
        """Runs a command in a guest and collects what it wrote."""
        from vswitchlab.guests import environment

        return self.client.run_in(guest, argv, env=environment(), timeout=timeout)

    def ping(self, source: str, target: str, *, count: int = 5, interval: float = 0.02) -> int:
        """Pings from one guest to another (or to an address); the number of packets lost."""
        options = ["--count", str(count), "--interval", str(interval), "--json"]
        argv = [sys.executable, "-m", "netvsc.probe", "ping", target, *options]
        done = self.run(source, argv, timeout=count * interval + 20)
        if not done.stdout:
            said = done.stderr.decode(errors="replace").strip() or done.detail
            raise AssertionError(f"ping {source} -> {target} did not run: {said}")
        return int(json.loads(done.stdout)["lost"])

    def port(self, guest: str, nic: int = 0) -> str:
        """The port of a guest's NIC as clients take it: `s0/a-eth0`."""
        found = self.lab.guest(guest).nics[nic]
        return f"{found.switch}/{found.port}"

    def drops(self) -> dict[str, dict[str, int]]:
        """Drop counters by port and reason; ports without drops are left out."""
        result = {}
        for switch in self.lab.switches:
            for port in self.client.list_ports(switch.name):
                counters = {drop.reason: drop.packets for drop in port.counters.drops}
                if counters:
                    result["/".join(port.name.split("/")[1::2])] = counters
        return result

    def stop_capture(self) -> None:
        """Ends the recording; the file is complete afterwards."""
        if self._capture_name:
            self.client.stop_capture(self._capture_name)
            self._recorder.join(10)
            self._capture_name = ""

    def _record(self) -> None:
        sources = [f"switches/{switch.name}" for switch in self.lab.switches]
        try:
            with (
                self.capture_file.open("wb", buffering=0) as file,
                self.client.capture(*sources, snap_length=128) as stream,
            ):
                for response in stream:
                    if response.HasField("capture"):
                        self._capture_name = response.capture.name
                        self._armed.set()
                    file.write(response.pcapng)
        except Exception as error:
            self._capture_fault = f"the capture failed: {type(error).__name__}: {error}"
        finally:
            self._armed.set()

    def report(self) -> str:
        """What happened on the wire, for the report of a failed test."""
        from vswitchlab import packets

        lines = []
        try:
            self.stop_capture()
            drops = self.drops()
            for port, counters in drops.items():
                text = ", ".join(f"{reason} {count}" for reason, count in counters.items())
                lines.append(f"drops at {port}: {text}")
            if not drops:
                lines.append("no drops at any port")
        except Exception as error:
            lines.append(f"the daemon does not tell: {error}")
        try:
            sightings = packets.read(self.capture_file.read_bytes())
        except Exception as error:
            lines.append(f"the capture cannot be read: {error}")
        else:
            lines.append(f"{len(sightings)} packets seen, the last {min(PACKETS_SHOWN, len(sightings))}:")
            lines += [f"  {packets.summary(sighting)}" for sighting in sightings[-PACKETS_SHOWN:]]
        if self._capture_fault:
            lines.append(self._capture_fault)
        lines.append(f"capture: {self.capture_file}")
        return "\n".join(lines)


class LabFactory:
    """What the `lab` fixture gives: call it with a file's path or a mapping, as often as needed."""

    def __init__(self, daemon: DaemonProcess, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory
        self.labs: list[TestLab] = []

    def __call__(self, what: str | Path | Mapping[str, Any], *, name: str | None = None) -> TestLab:
        from vswitchctl.client import Client
        from vswitchlab import lifecycle
        from vswitchlab.progress import Silent
        from vswitchlab.resolve import resolve, resolve_mapping
        from vswitchlab.source import load_file

        if isinstance(what, Mapping):
            resolved = resolve_mapping(what, name=name or "lab")
        else:
            resolved = resolve(load_file(what))
        self._call(lambda client: lifecycle.up(client, resolved, Silent()))
        one = TestLab(resolved, Client(self.daemon.socket), self.directory)
        self.labs.append(one)
        return one

    def _call(self, action: Callable[[Any], Awaitable[T]]) -> T:
        """Runs a coroutine in a thread of its own: the test may have a running loop in this one."""
        from vswitchctl.aio import AsyncClient

        result: list[T] = []
        failure: list[BaseException] = []

        async def with_client() -> None:
            async with AsyncClient(self.daemon.socket) as client:
                result.append(await action(client))

        def work() -> None:
            try:
                asyncio.run(with_client())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, name="lab")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def close(self) -> None:
        """Takes every lab down."""
        from vswitchlab import lifecycle
        from vswitchlab.progress import Silent

        async def away(client: Any) -> None:
            for found in (await lifecycle.running(client)).values():
                await lifecycle.down(client, found, Silent())

        for one in self.labs:
            one.stop_capture()
            one.client.close()
        self._call(away)


@pytest.fixture(scope="session")
def vswitch_daemon(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """A daemon for this session, in a directory of its own; it ends with the session, its guests too."""
    from vswitchctl.client import Client
    from vswitchctl.launch import start_daemon

    with tempfile.TemporaryDirectory(prefix="vswitch-pytest-") as directory:
        engine = request.config.getoption("--vswitch-engine")
        daemon = start_daemon(Path(directory) / "run", engine=engine, started_by="pytest")
        try:
            yield daemon
        finally:
            if daemon.process.poll() is None:
                with Client(daemon.socket) as client:
                    client.shutdown(stop_guests=True)
                daemon.process.wait(20)


@pytest.fixture
def lab(vswitch_daemon: DaemonProcess, tmp_path: Path) -> Iterator[LabFactory]:
    """Brings labs up for one test: `lab("two-guests.yaml")` or `lab({"guests": ["a", "b"]})`."""
    factory = LabFactory(vswitch_daemon, tmp_path)
    try:
        yield factory
    finally:
        factory.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    factory = getattr(item, "funcargs", {}).get("lab")
    if report.when == "call" and report.failed and isinstance(factory, LabFactory):
        for one in factory.labs:
            report.sections.append((f"lab {one.lab.name}", one.report()))
        log = factory.daemon.log_path
        if log.exists():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            report.sections.append(("vswitch daemon", "\n".join(tail)))
    return report
