"""A virtual machine's kernel command line: the user's, and what the daemon adds for its init.

A stock kernel has no agent of ours, so a lab's names and addresses travel on the command line:
`vswitch.hostname=web` and for each NIC
`vswitch.nic=eth0,00:15:5d:01:02:03,10.77.0.1/24,fd77::1/64,via=10.77.0.254,mtu=1400`. The kernel ignores
parameters with a dot in their name that belong to no module; an init may read them in /proc/cmdline.
"""

from __future__ import annotations

from collections.abc import Sequence

from vswitch_api.v1 import nic_pb2

DEFAULT = "console=ttyS0"
# COMMAND_LINE_SIZE of x86 (Linux arch/x86/include/asm/setup.h) with the terminating NUL.
MAX_BYTES = 2047
DEFAULT_MTU = 1500


def problem(text: str) -> str:
    """Why a text cannot be a command line; empty when it can."""
    if any(ord(character) < 32 or ord(character) > 126 for character in text):
        return "a kernel takes printable ASCII only"
    if len(text) > MAX_BYTES:
        return f"{len(text)} bytes; a kernel takes {MAX_BYTES}"
    return ""


def build(given: str, hostname: str, nics: Sequence[nic_pb2.Nic]) -> str:
    """The whole command line. What stands behind `--` is init's own and stays last."""
    words = (given or DEFAULT).split()
    end = words.index("--") if "--" in words else len(words)
    added = [f"vswitch.hostname={hostname}", *(f"vswitch.nic={_nic(nic)}" for nic in nics)]
    # The user's own text stays as it is: quoted values may hold runs of spaces.
    if end == len(words):
        return " ".join([(given or DEFAULT).strip(), *added])
    head, _, tail = f" {given} ".partition(" -- ")
    return " ".join([*filter(None, [head.strip()]), *added, "--", *filter(None, [tail.strip()])])


def _nic(nic: nic_pb2.Nic) -> str:
    parts = [nic.name.rpartition("/")[2], nic.mac, *nic.addresses]
    if nic.gateway:
        parts.append(f"via={nic.gateway}")
    if nic.mtu and nic.mtu != DEFAULT_MTU:
        parts.append(f"mtu={nic.mtu}")
    return ",".join(parts)
