"""A scapy socket is a host on the switch: it asks a guest for its MAC address, then pings it.

Needs a daemon (`vswitch daemon start`) and scapy (`pip install 'vswitch[scapy]'`). Prints both answers.
"""

from __future__ import annotations

import sys

from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether

from vswitchctl.client import Client
from vswitchctl.scapy_socket import PortSocket

ME, MY_ADDRESS, GUEST_ADDRESS = "02:00:00:00:00:99", "10.9.0.99", "10.9.0.1"


def main() -> int:
    with Client() as vswitch:
        vswitch.create_switch("example")
        try:
            vswitch.create_partition("a")
            vswitch.create_nic("a/eth0", port="example/a", addresses=[f"{GUEST_ADDRESS}/24"])
            vswitch.start_partition("a")
            vswitch.create_port("example/me")
            with PortSocket("example/me", client=vswitch) as me:
                who_has = ARP(hwsrc=ME, psrc=MY_ADDRESS, pdst=GUEST_ADDRESS)
                told = me.sr1(Ether(src=ME, dst="ff:ff:ff:ff:ff:ff") / who_has, timeout=5, verbose=False)
                if told is None:
                    print(f"nobody has {GUEST_ADDRESS}")
                    return 1
                print(f"{GUEST_ADDRESS} is at {told[ARP].hwsrc}")
                ping = Ether(src=ME, dst=told[ARP].hwsrc) / IP(src=MY_ADDRESS, dst=GUEST_ADDRESS) / ICMP(id=7)
                reply = me.sr1(ping, timeout=5, verbose=False)
            print(f"ping: {'no answer' if reply is None else reply[IP].src + ' answered'}")
            return 0 if reply is not None else 1
        finally:
            vswitch.delete_partition("a", force=True)
            vswitch.delete_switch("example", force=True)


if __name__ == "__main__":
    sys.exit(main())
