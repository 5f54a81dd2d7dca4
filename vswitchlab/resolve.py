"""Raw to resolved: fills in switches, NICs, addresses and host names, and checks what a schema cannot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from pathlib import Path as FilePath
from typing import Any

from vswitchlab import files
from vswitchlab.machines import machine, memory
from vswitchlab.problems import LabFileError, Path, Problem, did_you_mean
from vswitchlab.schema import check
from vswitchlab.source import Source
from vswitchlab.topology import Address, Extension, Gateway, Guest, Lab, Machine, Network, Nic, Switch

__all__ = ["resolve", "resolve_mapping"]


def resolve(source: Source) -> Lab:
    """Checks a lab file and fills in its defaults. Raises LabFileError with every problem found."""
    check(source)
    return _Resolver(source).lab()


def resolve_mapping(value: Mapping[str, Any], *, name: str = "lab", directory: FilePath | None = None) -> Lab:
    """A lab given as a dict (tests, notebooks); problems are reported without lines."""
    return resolve(Source(f"<{name}>", directory or FilePath.cwd(), dict(value)))


class _Resolver:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.raw: dict[str, Any] = source.value
        self.taken: dict[str, set[str]] = {}  # switch -> IP addresses in use
        self.free: dict[Network, Iterator[Any]] = {}

    def lab(self) -> Lab:
        name = self.raw.get("name") or self._name_from(self.source.file)
        switches = self._switches()
        drafts = self._drafts(name, {switch.name: switch for switch in switches})
        machines = {guest: self._machine(guest) for guest in self.raw["guests"]}
        if self.problems:
            raise LabFileError(self.problems)
        self._number(drafts, {switch.name: switch for switch in switches})
        if self.problems:
            raise LabFileError(self.problems)
        nics = {guest: tuple(draft.nic(guest) for draft in each) for guest, each in drafts.items()}
        guests = tuple(
            Guest(
                guest,
                nics[guest],
                self._commands(guest),
                _hosts(guest, nics),
                *machines[guest],
            )
            for guest in nics
        )
        return Lab(name, self.source.file, self.raw.get("engine"), tuple(switches), guests)

    def _bad(self, path: Path, what: str, remedy: str = "", *, at_value: bool = True) -> None:
        self.problems.append(self.source.problem(path, what, remedy, at_value=at_value))

    @staticmethod
    def _name_from(file: str) -> str:
        stem = FilePath(file.strip("<>")).name.lower().split(".")[0]
        return re.sub(r"[^a-z0-9-]+", "-", stem).strip("-0123456789")[:32].strip("-") or "lab"

    # switches

    def _switches(self) -> list[Switch]:
        raw = self.raw.get("switches") or ["s0"]
        named = (
            {name: {} for name in raw} if isinstance(raw, list) else {name: raw[name] or {} for name in raw}
        )
        result = []
        for index, (name, body) in enumerate(named.items()):
            path: Path = ("switches", name)
            networks = (
                self._network((*path, "subnet"), body.get("subnet", f"10.77.{index}.0/24"), 4),
                self._network((*path, "subnet6"), body.get("subnet6", f"fd77:0:0:{index:x}::/64"), 6),
            )
            extensions = self._extensions((*path, "extensions"), body.get("extensions", []))
            result.append(Switch(name, tuple(each for each in networks if each), extensions))
        return result

    def _network(self, path: Path, text: str | None, version: int) -> Network | None:
        if text is None:
            return None
        example = "10.77.0.0/24" if version == 4 else "fd77::/64"
        try:
            network = ip_network(text)
        except ValueError:
            try:
                wider = ip_network(text, strict=False)
            except ValueError:
                wider = None
            if wider is not None and wider.version == version:
                self._bad(path, f"{text} has bits set after its prefix", f"write {wider}")
            else:
                self._bad(path, f'"{text}" is not an IPv{version} network', f"for example {example}")
            return None
        if network.version != version:
            other = "subnet6" if network.version == 6 else "subnet"
            self._bad(path, f"{text} is an IPv{network.version} network", f"write it under {other}")
            return None
        if network.num_addresses < 4:
            self._bad(path, f"{text} has no room for two guests", f"for example {example}")
            return None
        return network

    def _extensions(self, path: Path, raw: list[Any]) -> tuple[Extension, ...]:
        result: list[Extension] = []
        for index, each in enumerate(raw):
            body: dict[str, Any] = {"file": each} if isinstance(each, str) else each
            here: Path = (*path, index) if isinstance(each, str) else (*path, index, "file")
            file = (self.source.directory / body["file"]).resolve()
            stem = re.sub(r"[^a-z0-9_-]+", "-", file.stem.lower()).strip("-_0123456789")[:63]
            name = body.get("name") or stem or "extension"
            wrong = files.problem(file, ".py")
            if wrong is not None:
                self._bad(here, *wrong)
            elif name in (known.name for known in result):
                self._bad(here, f'two extensions are named "{name}"', "give one of them a name")
            result.append(Extension(name, file, body.get("on_failure", "open")))
        return tuple(result)

    # guests

    def _guest(self, name: str) -> dict[str, Any]:
        raw = self.raw["guests"]
        return {} if isinstance(raw, list) else raw[name] or {}

    def _machine(self, guest: str) -> tuple[int | None, Machine | None]:
        body, path = self._guest(guest), ("guests", guest)
        return memory(self._bad, path, body), machine(self._bad, self.source.directory, path, body)

    def _drafts(self, lab: str, switches: dict[str, Switch]) -> dict[str, list[_Draft]]:
        drafts: dict[str, list[_Draft]] = {}
        macs: dict[str, Path] = {}
        for guest in self.raw["guests"]:
            path: Path = ("guests", guest, "nics")
            drafts[guest] = []
            names: set[str] = set()
            for index, each in enumerate(self._guest(guest).get("nics", list(switches))):
                body = {"switch": each} if isinstance(each, str) else each
                here: Path = (*path, index)
                draft = self._draft(
                    here, body, index, lab, guest, switches, shape_is_text=isinstance(each, str)
                )
                if draft is None:
                    continue
                if draft.name in names:
                    self._bad(
                        (*here, "name"), f'guest {guest} has two NICs named "{draft.name}"', "rename one"
                    )
                elif draft.mac in macs:
                    other = ".".join(str(part) for part in macs[draft.mac][1:2])
                    self._bad(
                        (*here, "mac"),
                        f"{draft.mac} is already the MAC address of guest {other}",
                        "change one of the two",
                    )
                names.add(draft.name)
                macs[draft.mac] = here
                drafts[guest].append(draft)
        return drafts

    def _draft(
        self, path: Path, body: dict[str, Any], index: int, lab: str, guest: str, switches: dict[str, Switch],
        *, shape_is_text: bool,
    ) -> _Draft | None:  # fmt: skip
        switch = body.get("switch")
        if switch is None:
            if len(switches) > 1:
                known = ", ".join(switches)
                self._bad(path, f"which switch? the lab has {known}", f"add switch: {next(iter(switches))}")
                return None
            switch = next(iter(switches))
        if switch not in switches:
            where = path if shape_is_text else (*path, "switch")
            guess = did_you_mean(switch, switches) or "add it under switches"
            self._bad(where, f'there is no switch "{switch}"; the lab has {", ".join(switches)}', guess)
            return None
        name = body.get("name", f"eth{index}")
        if name == "lo":
            self._bad((*path, "name"), '"lo" is the loopback interface', "for example eth0")
        draft = _Draft(
            path, name, switch, self._mac(path, body, f"{lab}/{guest}/{name}"), body.get("mtu", 1500)
        )
        if "addresses" in body:
            draft.addresses = self._addresses((*path, "addresses"), body["addresses"], switch)
        if "gateway" in body:
            draft.gateway = self._gateway((*path, "gateway"), body["gateway"])
        return draft

    def _mac(self, path: Path, body: dict[str, Any], seed: str) -> str:
        if "mac" not in body:
            return "00:15:5d:" + hashlib.sha256(seed.encode()).digest()[:3].hex(":")
        mac = str(body["mac"]).replace("-", ":").lower()
        if int(mac[:2], 16) & 1:
            self._bad((*path, "mac"), f"{mac} is a group address, not a NIC's", "make the first byte even")
        elif mac == "00:00:00:00:00:00":
            self._bad((*path, "mac"), f"{mac} is not a usable MAC address", "leave the key out to get one")
        return mac

    def _addresses(self, path: Path, raw: list[str], switch: str) -> list[Address]:
        result: list[Address] = []
        taken = self.taken.setdefault(switch, set())
        for index, text in enumerate(raw):
            here: Path = (*path, index)
            try:
                address = ip_interface(text)
            except ValueError:
                self._bad(here, f'"{text}" is not an IP address', "for example 10.77.0.1/24")
                continue
            network = address.network
            if "/" not in text:
                length = "24" if address.version == 4 else "64"
                self._bad(here, f"{text} lacks its prefix length", f"write {text}/{length}")
            elif address.is_multicast or address.is_unspecified or address.is_loopback:
                self._bad(here, f"{text} cannot be an interface's address", "for example 10.77.0.1/24")
            elif address.version == 4 and network.prefixlen < 31 and address.ip in (network[0], network[-1]):
                word = "network" if address.ip == network[0] else "broadcast"
                self._bad(
                    here, f"{text} is the {word} address of its network", f"use {network[1]} to {network[-2]}"
                )
            elif str(address.ip) in taken:
                self._bad(here, f"{address.ip} is used twice on switch {switch}", "change one of the two")
            else:
                taken.add(str(address.ip))
                result.append(address)
        return result

    def _gateway(self, path: Path, text: str) -> Gateway | None:
        try:
            return ip_address(text)
        except ValueError:
            self._bad(path, f'"{text}" is not an IP address', "for example 10.77.0.254")
            return None

    def _number(self, drafts: dict[str, list[_Draft]], switches: dict[str, Switch]) -> None:
        """Gives NICs without addresses the next free one of each network of their switch, in file order."""
        for draft in (draft for each in drafts.values() for draft in each):
            if draft.addresses is None:
                draft.addresses = []
                for network in switches[draft.switch].networks:
                    address = self._next(network, self.taken.setdefault(draft.switch, set()))
                    if address is None:
                        what = f"{network} of switch {draft.switch} has no free address left"
                        self._bad(draft.path, what, f"widen switches.{draft.switch}.subnet")
                        return
                    draft.addresses.append(address)
            if draft.gateway and not any(draft.gateway in address.network for address in draft.addresses):
                have = ", ".join(str(address) for address in draft.addresses) or "none"
                what = f"{draft.gateway} is in no network of this NIC (addresses: {have})"
                self._bad((*draft.path, "gateway"), what, "a gateway must be a neighbour")

    def _next(self, network: IPv4Network | IPv6Network, taken: set[str]) -> Address | None:
        hosts = self.free.setdefault(network, iter(network.hosts()))
        for host in hosts:
            if host != network[0] and str(host) not in taken:
                taken.add(str(host))
                return ip_interface(f"{host}/{network.prefixlen}")
        return None

    def _commands(self, guest: str) -> tuple[tuple[str, ...], ...]:
        raw = self._guest(guest).get("commands", [])
        return tuple(("sh", "-c", each) if isinstance(each, str) else tuple(each) for each in raw)


class _Draft:
    """A NIC on its way to being resolved."""

    __slots__ = ("addresses", "gateway", "mac", "mtu", "name", "path", "switch")

    def __init__(self, path: Path, name: str, switch: str, mac: str, mtu: int) -> None:
        self.path, self.name, self.switch, self.mac, self.mtu = path, name, switch, mac, mtu
        self.addresses: list[Address] | None = None
        self.gateway: Gateway | None = None

    def nic(self, guest: str) -> Nic:
        addresses = tuple(self.addresses or ())
        return Nic(
            self.name, self.switch, f"{guest}-{self.name}", self.mac, addresses, self.gateway, self.mtu
        )


def _hosts(guest: str, nics: dict[str, tuple[Nic, ...]]) -> dict[str, tuple[str, ...]]:
    """Who a guest can call by name: each guest's addresses on switches both are on, else all it has."""
    mine = {nic.switch for nic in nics[guest]}
    result: dict[str, tuple[str, ...]] = {}
    for name, theirs in nics.items():
        near = [nic for nic in theirs if nic.switch in mine] or list(theirs)
        addresses = tuple(str(address.ip) for nic in near for address in nic.addresses)
        if addresses:
            result[name] = addresses
    return result
