"""Which engine runs: `native` (Rust) where the module was built, `python` everywhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import vswitch_native

from . import guest_codecs as codecs
from . import memory

Engine = Literal["native", "python"]
ENGINES: tuple[Engine, ...] = ("native", "python")
COST = "packets cost about a hundred times more CPU"

_log = logging.getLogger("vswitch.engine")
_said = False


def default_engine() -> Engine:
    """`native` where the compiled module is there, else `python`, which is said once on the log with its
    cost."""
    global _said
    if vswitch_native.AVAILABLE:
        return "native"
    if not _said:
        _said = True
        _log.warning("running the Python engine: %s; until then %s", vswitch_native.WHY, COST)
    return "python"


def check_engine(engine: Engine) -> Engine:
    """`engine`, if it can run here. Raises RuntimeError with the remedy, ValueError for an unknown name."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    if engine == "native" and not vswitch_native.AVAILABLE:
        raise RuntimeError(f"engine native cannot run: {vswitch_native.WHY}; or choose engine python")
    return engine


def memory_class(engine: Engine) -> type[memory.GuestMemory]:
    """The GuestMemory class of `engine` (the native one has the same surface)."""
    if check_engine(engine) == "python":
        return memory.GuestMemory
    native: Any = _native_memory()
    cls: type[memory.GuestMemory] = native.GuestMemory
    return cls


def interrupt_class(engine: Engine) -> type[memory.Interrupt]:
    """The Interrupt class of `engine`; it takes the GuestMemory of the same engine."""
    if check_engine(engine) == "python":
        return memory.Interrupt
    native: Any = _native_memory()
    cls: type[memory.Interrupt] = native.Interrupt
    return cls


def guest_codecs(engine: Engine) -> codecs.GuestCodecs:
    """What reads a guest's control messages under `engine`."""
    if check_engine(engine) == "python":
        return codecs.PYTHON
    from . import native_codecs

    return native_codecs.NATIVE


def _native_memory() -> Any:
    if TYPE_CHECKING:
        return None
    from vswitch_native import memory as native

    return native
