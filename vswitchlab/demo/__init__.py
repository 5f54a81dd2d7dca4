"""`vswitch demo`: a daemon of its own, two guests on a switch, and a check of every claim."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from vswitchctl.aio import AsyncClient
from vswitchctl.client import VswitchError
from vswitchctl.launch import DaemonProcess, LaunchError, start_daemon
from vswitchctl.output import Format, write_plain
from vswitchlab import lifecycle
from vswitchlab.demo.checks import DURING_CAPTURE, FINAL, STORY, Action, no_shortcut
from vswitchlab.demo.stage import Check, CheckFailed, Stage
from vswitchlab.doctor import Finding, Level, blockers, diagnose, gather
from vswitchlab.progress import Reporter, Silent
from vswitchlab.resolve import resolve
from vswitchlab.source import load_text

__all__ = ["run"]

LAB = "guests: [a, b]"
LIMIT_SECONDS = 150.0  # for one check; a hang is a failure with a name


async def run(engine: str | None, output: Format) -> int:
    """Tells the story; the exit status."""
    facts = await asyncio.to_thread(gather)
    chosen = engine or ("python" if facts.native_missing else "native")
    if engine == "native" and facts.native_missing:
        sys.stderr.write(f"error: {facts.native_missing}\nremedy: vswitch demo --engine python\n")
        return 1
    findings = diagnose(facts)
    started = time.monotonic()
    if bad := blockers(findings):
        checks = [
            Check("machine", False, f"{each.check}: {each.text}; remedy: {each.remedy}", 0.0) for each in bad
        ]
        return _finish(checks, "none", chosen, started, output)
    if facts.native_missing and engine is None:
        native = next(each for each in findings if each.check == "native_module")
        sys.stderr.write(f"{native.text}\nremedy: {native.remedy}\n")
    directory = Path(tempfile.mkdtemp(prefix="vswitch-demo-"))
    checks = []
    try:
        with Reporter() as report:
            checks = await _story(chosen, directory, findings, report)
    except (LaunchError, VswitchError, lifecycle.LabError, OSError) as error:
        text = str(error)
        if remedy := getattr(error, "remedy", ""):
            text += f"; remedy: {remedy}"
        checks.append(Check("lab_up", False, text, time.monotonic() - started, _logs(directory)))
    failed = [check for check in checks if not check.passed]
    if not failed:
        shutil.rmtree(directory, ignore_errors=True)
    return _finish(checks, "netns", chosen, started, output, directory if failed else None)


async def _story(engine: str, directory: Path, findings: list[Finding], report: Reporter) -> list[Check]:
    lab = resolve(load_text(LAB, file="demo"))
    run_dir = directory / "run"
    report.begin(2 + len(lab.guests) + 1 + len(DURING_CAPTURE) + len(STORY) + len(FINAL))
    report.doing("starting a daemon")
    daemon = await asyncio.to_thread(start_daemon, run_dir, engine=engine, started_by="demo")
    report.done(f"a daemon of its own runs (pid {daemon.pid}, {engine} engine)")
    client = AsyncClient(daemon.socket)
    tap = next(each for each in findings if each.check == "tap")
    stage = Stage(client, lab, engine, run_dir, daemon, tap.level is Level.OK)
    checks: list[Check] = []
    try:
        await lifecycle.up(client, lab, _Within(report))
        checks.append(await _check(stage, no_shortcut, report))
        async with stage.capturing():
            for action in DURING_CAPTURE:
                checks.append(await _check(stage, action, report))
        for action in (*STORY, *FINAL):
            checks.append(await _check(stage, action, report))
    finally:
        await client.close()
        await _end(daemon, stage)
    return checks


class _Within(Silent):
    """The lab's own progress as part of the demo's."""

    def __init__(self, outer: Reporter) -> None:
        self.outer = outer

    def doing(self, text: str) -> None:
        self.outer.doing(text)

    def done(self, text: str) -> None:
        self.outer.done(text)

    def note(self, text: str) -> None:
        self.outer.note(text)


async def _check(stage: Stage, action: Action, report: Reporter) -> Check:
    name = action.__name__
    report.doing(name)
    started = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            detail = await action(stage)
        passed = True
    except (
        CheckFailed,
        VswitchError,
        lifecycle.LabError,
        OSError,
        TimeoutError,
        ValueError,
        KeyError,
    ) as error:
        words = str(error) or type(error).__name__
        detail = words if isinstance(error, CheckFailed) else f"{type(error).__name__}: {words}"
        passed = False
    check = Check(name, passed, detail, round(time.monotonic() - started, 3))
    if not passed:
        check.evidence = _evidence(stage)
    report.done(f"{'ok    ' if passed else 'FAILED'} {name}: {detail}")
    return check


def _evidence(stage: Stage) -> list[str]:
    """Files to look at: logs, and the capture so far, which is written for this."""
    paths = _logs(stage.run_dir)
    if stage.capture:
        file = stage.run_dir.parent / "capture.pcapng"
        file.write_bytes(stage.capture)
        paths.append(str(file))
    return paths


def _logs(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*.log"))


async def _end(daemon: DaemonProcess, stage: Stage) -> None:
    """Whatever happened: nothing of the demo outlives it."""
    if daemon.process.poll() is not None:
        return
    try:
        async with AsyncClient(daemon.socket, timeout=5) as client:
            await client.shutdown(stop_guests=True)
        await asyncio.to_thread(daemon.process.wait, 10)
    except Exception:
        daemon.kill()


def _finish(
    checks: list[Check], guests: str, engine: str, started: float, output: Format, kept: Path | None = None
) -> int:
    passed = sum(check.passed for check in checks)
    failed = len(checks) - passed
    last = f"demo: {passed} checks passed, {failed} failed (guests: {guests}, engine: {engine})"
    if output is Format.TABLE:
        for check in checks:
            print(f"{'ok    ' if check.passed else 'FAILED'} {check.name:16} {check.detail}")
        for path in dict.fromkeys(path for check in checks for path in check.evidence):
            print(f"see {path}")
        if kept:
            print(f"kept for you: {kept}")
        print(last)
    else:
        data = {
            "checks": [asdict(check) for check in checks],
            "passed": passed,
            "failed": failed,
            "guests": guests,
            "engine": engine,
            "seconds": round(time.monotonic() - started, 2),
            "summary": last,
        }
        write_plain(data, output)
    return 1 if failed else 0
