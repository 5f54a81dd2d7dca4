"""The flow cache: what was decided once holds for every frame that is equal in all that was looked at.

Entries with the same mask share a table (tuple space); a lookup tries the masks in the order in which they
came. All entries that match a frame agree, because each holds for every frame equal in its fields. Bounded
in masks and entries; a full cache gives up its oldest entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from vswitch.engine import FlowInfo, Limits, SwitchCounters
from vswitch.engine.python.mac import MacKey
from vswitch.engine.python.parse import Packet
from vswitch.engine.python.pipeline import Drop, Program
from vswitch.engine.texts import DropText, action_texts, match_texts
from vswitch.fields import Field

__all__ = ["FlowCache", "FlowEntry"]


@dataclass(slots=True, eq=False)
class FlowEntry:
    """One cached decision."""

    mask: int
    key: tuple[int, ...]
    program: Program
    depends_on: tuple[MacKey, ...]
    expires_ns: int | None
    used_ns: int
    refreshed_ns: int
    packets: int = 0
    bytes: int = 0


@dataclass(slots=True)
class _Table:
    bits: tuple[int, ...]
    entries: dict[tuple[int, ...], FlowEntry]


class FlowCache:
    """The entries, and the index of what they depend on."""

    def __init__(self, limits: Limits, counters: SwitchCounters) -> None:
        self._limits = limits
        self._counters = counters
        self._tables: dict[int, _Table] = {}
        self._by_age: dict[FlowEntry, None] = {}
        self._by_mac: dict[MacKey, set[FlowEntry]] = {}

    def lookup(self, packet: Packet, now_ns: int) -> FlowEntry | None:
        """The entry for the frame; counts the hit or miss."""
        for table in self._tables.values():
            entry = table.entries.get(packet.key(table.bits))
            if entry is None:
                continue
            if entry.expires_ns is not None and now_ns >= entry.expires_ns:
                self._remove(entry)
                break
            entry.used_ns = now_ns
            entry.packets += 1
            entry.bytes += packet.length
            self._counters.flow_hits += 1
            return entry
        self._counters.flow_misses += 1
        return None

    def publish(
        self,
        packet: Packet,
        mask: int,
        program: Program,
        depends_on: tuple[MacKey, ...],
        ttl_ns: int,
        now_ns: int,
    ) -> None:
        """Keeps the decision; refuses another mask when there are as many as allowed."""
        table = self._tables.get(mask)
        if table is None:
            if len(self._tables) >= self._limits.flow_masks:
                self._counters.flows_refused += 1
                return
            bits = tuple(field.value for field in Field if mask & field.bit)
            table = self._tables[mask] = _Table(bits, {})
        key = packet.key(table.bits)
        old = table.entries.get(key)
        if old is not None:
            self._remove(old)
            table = self._tables.setdefault(mask, table)
        elif len(self._by_age) >= self._limits.flow_entries:
            self._remove(next(iter(self._by_age)))
            self._counters.flows_evicted += 1
            table = self._tables.setdefault(mask, table)
        expires = now_ns + ttl_ns if ttl_ns else None
        entry = FlowEntry(mask, key, program, depends_on, expires, now_ns, now_ns, 1, packet.length)
        table.entries[key] = entry
        self._by_age[entry] = None
        for mac in depends_on:
            self._by_mac.setdefault(mac, set()).add(entry)
        self._counters.flows_published += 1

    def invalidate(self, key: MacKey) -> None:
        """Drops every entry that depends on this row of the MAC table."""
        for entry in list(self._by_mac.get(key, ())):
            self._remove(entry)

    def sweep(self, now_ns: int) -> None:
        """Drops what expired or was not hit for the idle time."""
        idle_ns = int(self._limits.flow_idle_seconds * 1e9)
        for entry in list(self._by_age):
            expired = entry.expires_ns is not None and now_ns >= entry.expires_ns
            if expired or now_ns - entry.used_ns >= idle_ns:
                self._remove(entry)

    def flush(self) -> None:
        self._tables.clear()
        self._by_age.clear()
        self._by_mac.clear()

    def rows(self, now_ns: int) -> list[FlowInfo]:
        """All entries, oldest first."""
        return [
            FlowInfo(
                _match_text(entry),
                _actions(entry.program),
                entry.packets,
                entry.bytes,
                (now_ns - entry.used_ns) / 1e9,
                None if entry.expires_ns is None else max(0.0, (entry.expires_ns - now_ns) / 1e9),
            )
            for entry in self._by_age
        ]

    def _remove(self, entry: FlowEntry) -> None:
        table = self._tables[entry.mask]
        del table.entries[entry.key]
        if not table.entries:
            del self._tables[entry.mask]
        del self._by_age[entry]
        for mac in entry.depends_on:
            dependents = self._by_mac.get(mac)
            if dependents is not None:
                dependents.discard(entry)
                if not dependents:
                    del self._by_mac[mac]


def _match_text(entry: FlowEntry) -> dict[str, str]:
    fields = [field for field in Field if entry.mask & field.bit]
    return match_texts(dict(zip(fields, entry.key, strict=True)))


def _actions(program: Program) -> tuple[str, ...]:
    return action_texts(
        _words(program.drop), [(one.port_id, _words(one.drop)) for one in program.destinations]
    )


def _words(drop: Drop | None) -> DropText | None:
    return None if drop is None else DropText(drop.reason, drop.detail, drop.dropped_by)
