"""What CONFIGURE may say, and what the guest makes of it."""

from __future__ import annotations

import pytest

from netvsc.agent import hosts_file
from netvsc.link import InterfaceConfig

GOOD = {"mac": "02:00:00:00:00:01", "name": "eth0", "addresses": ["10.0.0.1/24", "fd00::1/64"], "mtu": 1400}


def test_an_interface_is_read_with_its_addresses_and_defaults() -> None:
    config = InterfaceConfig.parse(GOOD)
    assert config.mac == bytes.fromhex("020000000001")
    assert config.addresses == ("10.0.0.1/24", "fd00::1/64")
    assert (config.mtu, config.gateway) == (1400, None)
    assert InterfaceConfig.parse({**GOOD, "speed": 10}) == InterfaceConfig.parse(GOOD), "of a newer daemon"
    assert InterfaceConfig.parse({"mac": "02-00-00-00-00-01", "name": "lan"}).mtu == 1500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mac": "02:00:00:00:00"}, "must be six hex bytes"),
        ({"mac": None}, "must be six hex bytes"),
        ({"name": "a/b"}, "without '/'"),
        ({"name": "a" * 16}, "1..15 bytes"),
        ({"mtu": 67}, "mtu must be 68..65521"),
        ({"mtu": "1500"}, "mtu must be 68..65521"),
        ({"addresses": ["10.0.0.1"]}, "ADDRESS/PREFIX"),
        ({"addresses": ["10.0.0.1/40"]}, "10.0.0.1/40"),
        ({"addresses": "10.0.0.1/24"}, "must be a list"),
        ({"gateway": "here"}, "here"),
    ],
)
def test_what_an_interface_cannot_be_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InterfaceConfig.parse({**GOOD, **change})


def test_hosts_hold_localhost_the_names_given_and_the_guest_itself() -> None:
    lines = hosts_file("a", {"b": ["10.0.0.2", "fd00::2"]}).splitlines()
    assert lines == [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "10.0.0.2\tb",
        "fd00::2\tb",
        "127.0.1.1\ta",
    ]
    assert "127.0.1.1" not in hosts_file("a", {"a": ["10.0.0.1"]})


@pytest.mark.parametrize(
    "hosts", [[], {"a b": []}, {"a\nb": []}, {"a": "10.0.0.1"}, {"a": ["nowhere"]}, {"": []}]
)
def test_hosts_that_would_break_the_file_are_refused(hosts: object) -> None:
    with pytest.raises(ValueError, match=r"configuration|nowhere"):
        hosts_file("a", hosts)
