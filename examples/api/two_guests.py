"""Two guests on a switch, through the synchronous client: made, started, pinged, traced, taken away again.

Needs a daemon: `vswitch daemon start`. Prints what each step gave.
"""

from __future__ import annotations

import sys

from vswitchctl.client import Client, VswitchError

PING = [sys.executable, "-m", "netvsc.probe", "ping", "b", "--count", "3", "--interval", "0.1"]


def main() -> int:
    with Client() as vswitch:
        vswitch.create_switch("example")
        hosts = {"a": ["10.9.0.1"], "b": ["10.9.0.2"]}
        try:
            for name, (address,) in hosts.items():
                vswitch.create_partition(name, hosts=hosts)
                vswitch.create_nic(f"{name}/eth0", port=f"example/{name}", addresses=[f"{address}/24"])
                guest = vswitch.start_partition(name)
                print(f"guest {name} runs as process {guest.agent_pid}")
            ping = vswitch.run_in("a", PING, timeout=30)
            print(ping.stdout.decode(), end="")
            for entry in vswitch.list_mac_entries("example"):
                print(f"{entry.mac} is behind {entry.port}")
            try:
                vswitch.get_port("example/nowhere")
            except VswitchError as error:
                print(f"as expected: {error} ({error.reason}); {error.remedy}")
        finally:
            for partition in vswitch.list_partitions():
                if partition.name.endswith(("/a", "/b")):
                    vswitch.delete_partition(partition.name, force=True)
            vswitch.delete_switch("example", force=True)
        return 0 if ping.ok else 1


if __name__ == "__main__":
    sys.exit(main())
