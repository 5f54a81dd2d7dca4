"""Traces by API: a switch's steps for a frame, in the API's words, with what they come to."""

from __future__ import annotations

from collections.abc import Sequence

from vswitch.drops import DropReason
from vswitch.engine import TraceStep
from vswitch_api.v1 import trace_pb2
from vswitchd.errors import invalid
from vswitchd.portio import FRAME_BYTES, MAX_FRAMES
from vswitchd.switches import PortRecord, SwitchManager, SwitchRecord


async def trace(switches: SwitchManager, request: trace_pb2.TraceRequest) -> trace_pb2.TraceResponse:
    """What would happen to each frame of the request."""
    port = switches.find_port(request.port, "port")
    if not 1 <= len(request.frames) <= MAX_FRAMES:
        raise invalid("frames", f"{len(request.frames)}; 1 to {MAX_FRAMES} are taken")
    for index, frame in enumerate(request.frames):
        if len(frame) not in FRAME_BYTES:
            raise invalid(f"frames[{index}]", f"{len(frame)} bytes; a frame has at least {FRAME_BYTES.start}")
    return trace_pb2.TraceResponse(frames=[await _trace_one(port, frame) for frame in request.frames])


async def _trace_one(port: PortRecord, frame: bytes) -> trace_pb2.TracedFrame:
    steps = await port.port.trace(frame)
    delivered = [step.port_id for step in steps if step.verdict == "deliver" and step.port_id is not None]
    drops = [step for step in steps if step.verdict == "drop"]
    traced = trace_pb2.TracedFrame(
        steps=[_step(port.switch, step) for step in steps],
        delivered_to=[_port_name(port.switch, number) for number in delivered],
    )
    if drops and not delivered:
        last = drops[-1]
        traced.drop_reason = DropReason(last.reason).name if last.reason is not None else "UNKNOWN"
        by = f"{last.dropped_by}: " if last.dropped_by else ""
        traced.drop_detail = f"{by}{last.detail}"
    return traced


def _step(switch: SwitchRecord, step: TraceStep) -> trace_pb2.TraceStep:
    stage = step.stage if step.port_id is None else f"{step.stage} {_leaf(switch, step.port_id)}"
    return trace_pb2.TraceStep(
        stage=stage, verdict=step.verdict, detail=step.detail, fields_read=_sorted(step.fields)
    )


def _sorted(fields: Sequence[str]) -> list[str]:
    return sorted(set(fields))


def _port_name(switch: SwitchRecord, number: int) -> str:
    port = switch.port_numbered(number)
    return port.name if port is not None else f"{switch.name}/ports/{number}"


def _leaf(switch: SwitchRecord, number: int) -> str:
    return _port_name(switch, number).rpartition("/")[2]
