"""The base classes of extensions, and the watch over state that a verdict must not silently depend on."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any, ClassVar

from vswitch.extension.packet import Packet
from vswitch.extension.verdict import Verdict

_CONSTANT = (int, float, complex, str, bytes, NoneType, type, FunctionType, MethodType, ModuleType, property)
_CONTAINERS = (tuple, frozenset)


class Extension:
    """What all kinds share.

    While a verdict is being found, attributes of `self` are watched. A value that can change in place (a
    dict, a list, an object) makes the verdict good for one frame only, and so does an attribute that was
    assigned after loading. Constants, tuples and frozensets do not. State elsewhere, in module globals say,
    is the author's to declare: `packet.allow(cache=False)`.
    """

    kind: ClassVar[str] = ""
    _judging: ClassVar[Packet | None] = None
    _read: ClassVar[set[str]] = set()
    _assigned: ClassVar[set[str]] = set()
    _on_stale: ClassVar[Callable[[str], None] | None] = None

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        packet = Extension._judging
        if packet is not None and not name.startswith("__"):
            if name in Extension._assigned or not _is_constant(value):
                packet.depends_on_state()
            else:
                Extension._read.add(name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        packet = Extension._judging
        if packet is not None:
            packet.depends_on_state()
            Extension._assigned.add(name)
            if name in Extension._read and Extension._on_stale is not None:
                # Verdicts that rest on the old value may be cached: the switch forgets them.
                Extension._read.discard(name)
                Extension._on_stale(name)


class Filter(Extension):
    """Lets frames pass or drops them. Override one or both."""

    kind = "filter"

    def ingress(self, packet: Packet) -> Verdict:
        """A frame comes in from a port's NIC; its destinations are not known yet."""
        return packet.allow()

    def egress(self, packet: Packet) -> Verdict:
        """A frame is about to go out to `packet.out_port`; asked once per destination."""
        return packet.allow()


def _is_constant(value: object) -> bool:
    if isinstance(value, _CONTAINERS):
        return all(_is_constant(item) for item in value)
    return isinstance(value, _CONSTANT)


def passes_of(extension: type[Extension]) -> frozenset[str]:
    """Which of `ingress` and `egress` the class overrides."""
    return frozenset(
        name for name in ("ingress", "egress") if getattr(extension, name, None) is not getattr(Filter, name)
    )


def judge(extension: Extension, egress: bool, packet: Packet) -> Verdict:
    """Ask the extension about one frame. Raises what it raises; TypeError when it answers something else."""
    method = extension.egress if egress else extension.ingress
    Extension._judging = packet
    try:
        verdict = method(packet)
    finally:
        Extension._judging = None
    if not isinstance(verdict, Verdict):
        name = f"{type(extension).__name__}.{'egress' if egress else 'ingress'}"
        raise TypeError(f"{name} returned {verdict!r}; return packet.allow() or packet.drop(reason)")
    return verdict


def watch_staleness(callback: Callable[[str], None]) -> None:
    """Set who is told when an attribute changes that cached verdicts may rest on."""
    Extension._on_stale = callback
