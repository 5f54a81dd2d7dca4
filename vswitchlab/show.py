"""What is printed: tables for people, JSON and YAML for programs, from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vswitch_api.v1 import nic_pb2, partition_pb2
from vswitchctl import names
from vswitchctl.aio import AsyncClient
from vswitchctl.output import Format, write_plain, write_table
from vswitchlab.lifecycle import RunningLab, engine_name

__all__ = ["emit", "lab_rows", "labs_rows"]

Row = Mapping[str, Any]


def emit(output: Format, data: Any, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Writes `data` as JSON or YAML, or `rows` as a table, to stdout."""
    if output is Format.TABLE:
        headings = [column.replace("_", " ") for column in columns]
        write_table(headings, [[_cell(row.get(column, "")) for column in columns] for row in rows])
    else:
        write_plain(data, output)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    return str(value) if value not in ("", None) else "-"


def _state(kind: Any, value: int, prefix: str) -> str:
    return str(kind.Name(value)).removeprefix(prefix).lower()


async def lab_rows(client: AsyncClient, lab: RunningLab) -> list[dict[str, Any]]:
    """One row for each NIC of the lab (and each guest without one), as the daemon sees it now."""
    rows: list[dict[str, Any]] = []
    for partition in lab.partitions:
        state = _state(partition_pb2.PartitionState, partition.state, "PARTITION_STATE_")
        kind = "vm" if partition.WhichOneof("spec") == "kvm" else "netns"
        base = {
            "guest": names.leaf(partition.name),
            "kind": kind,
            "state": state,
            "detail": partition.detail,
        }
        nics = await client.list_nics(partition.name)
        for nic in nics:
            rows.append(
                {
                    **base,
                    "nic": names.leaf(nic.name),
                    "port": names.short(nic.port),
                    "mac": nic.mac,
                    "addresses": list(nic.addresses),
                    "nic_state": _state(nic_pb2.NicState, nic.state, "NIC_STATE_"),
                }
            )
        if not nics:
            rows.append({**base, "nic": "", "port": "", "mac": "", "addresses": [], "nic_state": ""})
    return rows


def labs_rows(labs: Mapping[str, RunningLab]) -> list[dict[str, Any]]:
    """One row for each lab."""
    return [
        {
            "lab": lab.name,
            "guests": [names.leaf(partition.name) for partition in lab.partitions],
            "switches": [names.leaf(switch.name) for switch in lab.switches],
            "engine": ", ".join(sorted({engine_name(switch.engine) for switch in lab.switches})),
            "file": lab.file,
        }
        for lab in labs.values()
    ]
