"""Only known network cards may send, and each only from the port that it belongs to."""

from vswitch.extension import Filter, Packet, Verdict


class OnlyTheseMacs(Filter):
    allowed = (
        ("a", "02:00:00:00:00:01"),
        ("b", "02:00:00:00:00:02"),
    )

    def ingress(self, packet: Packet) -> Verdict:
        if (packet.port, packet.eth.src) in self.allowed:
            return packet.allow()
        return packet.drop(f"{packet.eth.src} does not belong to port {packet.port}")
