"""A resolved lab: every default filled in, every name checked. What is brought up is exactly this."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Any, Literal

__all__ = ["Address", "Extension", "Gateway", "Guest", "Lab", "Machine", "Network", "Nic", "Switch"]

Address = IPv4Interface | IPv6Interface
Gateway = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension of a switch; `file` is absolute."""

    name: str
    file: Path
    on_failure: Literal["open", "closed"]


@dataclass(frozen=True, slots=True)
class Switch:
    """A switch; `networks` are those that addresses are taken from (at most one of each family)."""

    name: str
    networks: tuple[Network, ...]
    extensions: tuple[Extension, ...]


@dataclass(frozen=True, slots=True)
class Nic:
    """A synthetic NIC and the switch port it is on. `mtu` is in bytes, without the Ethernet header."""

    name: str
    switch: str
    port: str
    mac: str
    addresses: tuple[Address, ...]
    gateway: Gateway | None
    mtu: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What makes a guest a virtual machine. `host_cpus`: empty for all."""

    kernel: Path
    initrd: Path | None
    cmdline: str
    cpus: int
    host_cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Guest:
    """A netns guest, or a virtual machine where `machine` says so. `hosts`: the names it can resolve (a
    virtual machine: by what its own system has); `memory`: MiB, None for the daemon's default.
    """

    name: str
    nics: tuple[Nic, ...]
    commands: tuple[tuple[str, ...], ...]
    hosts: dict[str, tuple[str, ...]]
    memory: int | None
    machine: Machine | None = None

    @property
    def kind(self) -> str:
        """As in a lab file."""
        return "vm" if self.machine else "netns"


@dataclass(frozen=True, slots=True)
class Lab:
    """The whole lab. `engine` is None where the file leaves it to the daemon."""

    name: str
    file: str
    engine: Literal["native", "python"] | None
    switches: tuple[Switch, ...]
    guests: tuple[Guest, ...]

    def guest(self, name: str) -> Guest:
        """The guest of that name. Raises KeyError."""
        for guest in self.guests:
            if guest.name == name:
                return guest
        raise KeyError(
            f"lab {self.name} has no guest {name}; it has {', '.join(each.name for each in self.guests)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values in the shape of a full lab file, for `validate -o yaml` and for tests."""
        return {
            "name": self.name,
            **({"engine": self.engine} if self.engine else {}),
            "switches": {
                switch.name: {
                    "subnet": next((str(each) for each in switch.networks if each.version == 4), None),
                    "subnet6": next((str(each) for each in switch.networks if each.version == 6), None),
                    "extensions": [
                        {"file": str(each.file), "name": each.name, "on_failure": each.on_failure}
                        for each in switch.extensions
                    ],
                }
                for switch in self.switches
            },
            "guests": {
                guest.name: {
                    "nics": [
                        {
                            "switch": nic.switch,
                            "name": nic.name,
                            "mac": nic.mac,
                            "addresses": [str(address) for address in nic.addresses],
                            **({"gateway": str(nic.gateway)} if nic.gateway else {}),
                            "mtu": nic.mtu,
                        }
                        for nic in guest.nics
                    ],
                    **(_machine(guest.machine) if guest.machine else {"commands": _commands(guest)}),
                    **({"memory": guest.memory} if guest.memory else {}),
                }
                for guest in self.guests
            },
        }


def _commands(guest: Guest) -> list[list[str]]:
    return [list(command) for command in guest.commands]


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "kind": "vm",
        "kernel": str(machine.kernel),
        **({"initrd": str(machine.initrd)} if machine.initrd else {}),
        "cmdline": machine.cmdline,
        "cpus": machine.cpus,
        **({"host_cpus": list(machine.host_cpus)} if machine.host_cpus else {}),
    }
