"""Resource names: how short names ("s0/p0", "a/eth0") become full ones ("switches/s0/ports/p0")."""

from __future__ import annotations


def switch(name: str) -> str:
    """`s0` or `switches/s0` -> `switches/s0`."""
    return name if name.startswith("switches/") else f"switches/{name}"


def port(name: str) -> str:
    """`s0/p0` or `switches/s0/ports/p0` -> `switches/s0/ports/p0`."""
    return _child(name, "switches", "ports", "SWITCH/PORT")


def partition(name: str) -> str:
    """`a` or `partitions/a` -> `partitions/a`."""
    return name if name.startswith("partitions/") else f"partitions/{name}"


def nic(name: str) -> str:
    """`a/eth0` or `partitions/a/nics/eth0` -> `partitions/a/nics/eth0`."""
    return _child(name, "partitions", "nics", "PARTITION/NIC")


def extension(name: str) -> str:
    """`s0/block_telnet` or the full name -> `switches/s0/extensions/block_telnet`."""
    return _child(name, "switches", "extensions", "SWITCH/EXTENSION")


def capture(name: str) -> str:
    """`3` or `captures/3` -> `captures/3`."""
    return name if name.startswith("captures/") else f"captures/{name}"


def leaf(name: str) -> str:
    """The last part of a resource name."""
    return name.rsplit("/", 1)[-1]


def short(name: str) -> str:
    """The name as the command line takes it: `switches/s0/ports/p0` -> `s0/p0`."""
    return "/".join(name.split("/")[1::2])


def _child(name: str, collection: str, children: str, shape: str) -> str:
    parts = name.split("/")
    if len(parts) == 4 and parts[0] == collection and parts[2] == children:
        return name
    if len(parts) == 2 and all(parts):
        return f"{collection}/{parts[0]}/{children}/{parts[1]}"
    raise ValueError(f"{name!r} is not a name of the form {shape}")
