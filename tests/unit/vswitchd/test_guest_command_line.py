"""What the daemon adds to a virtual machine's command line, and what a kernel does not take."""

from __future__ import annotations

from vswitch_api.v1 import nic_pb2
from vswitchd.kinds import command_line

NIC = nic_pb2.Nic(
    name="partitions/web/nics/eth0",
    mac="00:15:5d:01:02:03",
    addresses=["10.77.0.1/24", "fd77::1/64"],
    gateway="10.77.0.254",
    mtu=1400,
)
BARE = nic_pb2.Nic(name="partitions/web/nics/eth1", mac="00:15:5d:01:02:04", mtu=1500)


def test_names_and_addresses_follow_the_user_s_words() -> None:
    assert command_line.build("console=ttyS0  quiet ", "web", [NIC, BARE]) == (
        "console=ttyS0  quiet vswitch.hostname=web "
        "vswitch.nic=eth0,00:15:5d:01:02:03,10.77.0.1/24,fd77::1/64,via=10.77.0.254,mtu=1400 "
        "vswitch.nic=eth1,00:15:5d:01:02:04"
    )


def test_without_words_there_is_a_console() -> None:
    assert command_line.build("", "web", []) == "console=ttyS0 vswitch.hostname=web"


def test_what_is_init_s_own_stays_last() -> None:
    assert command_line.build("quiet -- single  user", "w", []) == "quiet vswitch.hostname=w -- single  user"
    assert command_line.build("-- single", "w", []) == "vswitch.hostname=w -- single"
    assert command_line.build("quiet --", "w", []) == "quiet vswitch.hostname=w --"


def test_a_kernel_takes_printable_ascii_of_a_bounded_length() -> None:
    assert command_line.problem("a" * command_line.MAX_BYTES) == ""
    assert command_line.problem("a" * 2048) == "2048 bytes; a kernel takes 2047"
    for text in ("a\nb", "a\0b", "\u00e4"):
        assert command_line.problem(text) == "a kernel takes printable ASCII only"
