"""A trace in words and as plain data: what each stage decided about a frame, and what came of it.

steps = await switch.port("a").trace(frame)
print(text(steps, {port.id: port.name for port in switch.ports.values()}))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vswitch.engine import TraceStep

__all__ = ["as_data", "outcome", "text"]

_NAMES: Mapping[int, str] = {}


def text(steps: Sequence[TraceStep], ports: Mapping[int, str] = _NAMES) -> str:
    """One line per step in aligned columns, then the outcome. `ports` gives names to port numbers."""
    rows = [(_stage(step, ports), step.verdict, _detail(step)) for step in steps]
    first = max((len(stage) for stage, _, _ in rows), default=0)
    second = max((len(verdict) for _, verdict, _ in rows), default=0)
    lines = [f"{stage:<{first}}  {verdict:<{second}}  {detail}".rstrip() for stage, verdict, detail in rows]
    return "\n".join([*lines, f"=> {outcome(steps, ports)}"])


def outcome(steps: Sequence[TraceStep], ports: Mapping[int, str] = _NAMES) -> str:
    """`delivered to b, c`, or `dropped: Filtered (8): <who and why>`; both where destinations fared
    differently.
    """
    delivered = [_port(step.port_id, ports) for step in steps if step.verdict == "deliver"]
    parts = [f"delivered to {', '.join(delivered)}"] if delivered else []
    for step in steps:
        if step.verdict == "drop":
            reason = "" if step.reason is None else f" {step.reason.label} ({int(step.reason)}):"
            where = "" if step.port_id is None else f" on the way to {_port(step.port_id, ports)}"
            parts.append(f"dropped{where}:{reason} {step.detail}")
    return "; ".join(parts) or "not delivered: there is no other connected port"


def as_data(steps: Sequence[TraceStep], ports: Mapping[int, str] = _NAMES) -> list[dict[str, Any]]:
    """The steps as JSON-able objects; members that do not apply are left out."""
    found = []
    for step in steps:
        entry: dict[str, Any] = {"stage": step.stage, "verdict": step.verdict, "detail": step.detail}
        if step.fields:
            entry["fields"] = list(step.fields)
        if step.port_id is not None:
            entry["port"] = _port(step.port_id, ports)
        if step.reason is not None:
            entry["reason"] = {"code": int(step.reason), "name": step.reason.label}
        if step.dropped_by is not None:
            entry["dropped_by"] = step.dropped_by
        found.append(entry)
    return found


def _stage(step: TraceStep, ports: Mapping[int, str]) -> str:
    return step.stage if step.port_id is None else f"{step.stage} {_port(step.port_id, ports)}"


def _detail(step: TraceStep) -> str:
    return f"{step.detail}  (reads {', '.join(step.fields)})" if step.fields else step.detail


def _port(port_id: int | None, ports: Mapping[int, str]) -> str:
    return "?" if port_id is None else ports.get(port_id, str(port_id))
