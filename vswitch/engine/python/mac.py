"""The MAC table: which port an address was last seen behind, per VLAN, bounded and aged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vswitch.engine import Limits, MacEntry, SwitchCounters

__all__ = ["MacKey", "MacTable"]

MacKey = tuple[int, int]
"""VLAN id and address (48 bits)."""


@dataclass(slots=True)
class _Row:
    port_id: int
    seen_ns: int


class MacTable:
    """`changed` is called with the key of every row that appears, moves or goes: cached flows depend on
    it.
    """

    def __init__(self, limits: Limits, counters: SwitchCounters, changed: Callable[[MacKey], None]) -> None:
        self._rows: dict[MacKey, _Row] = {}
        self._limit = limits.mac_entries
        self._age_ns = int(limits.mac_age_seconds * 1e9)
        self._counters = counters
        self._changed = changed

    def lookup(self, key: MacKey) -> int | None:
        """The port behind which the address is, or None."""
        row = self._rows.get(key)
        return None if row is None else row.port_id

    def learn(self, key: MacKey, port_id: int, now_ns: int) -> bool:
        """Notes that the address sent from `port_id`. False when the table is full."""
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= self._limit:
                self._counters.macs_refused += 1
                return False
            self._rows[key] = _Row(port_id, now_ns)
            self._counters.macs_learned += 1
            self._changed(key)
            return True
        row.seen_ns = now_ns
        if row.port_id != port_id:
            row.port_id = port_id
            self._counters.macs_moved += 1
            self._changed(key)
        return True

    def refresh(self, key: MacKey, now_ns: int) -> None:
        """A cached flow of the address was hit."""
        row = self._rows.get(key)
        if row is not None:
            row.seen_ns = now_ns

    def sweep(self, now_ns: int) -> None:
        """Purges what was not seen for the table's age."""
        self._purge([key for key, row in self._rows.items() if now_ns - row.seen_ns >= self._age_ns])

    def forget_port(self, port_id: int) -> None:
        """Purges all that was learned from a port."""
        self._purge([key for key, row in self._rows.items() if row.port_id == port_id])

    def rows(self, now_ns: int) -> list[MacEntry]:
        """The table, ordered by VLAN and address."""
        return [
            MacEntry(mac.to_bytes(6, "big"), vlan, row.port_id, (now_ns - row.seen_ns) / 1e9)
            for (vlan, mac), row in sorted(self._rows.items())
        ]

    def _purge(self, keys: list[MacKey]) -> None:
        for key in keys:
            del self._rows[key]
            self._counters.macs_purged += 1
            self._changed(key)
