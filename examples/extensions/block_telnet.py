"""Nobody opens a telnet connection through this switch; everything else passes."""

from vswitch.extension import Filter, Packet, Verdict


class BlockTelnet(Filter):
    def ingress(self, packet: Packet) -> Verdict:
        if packet.tcp and packet.tcp.dport == 23:
            return packet.drop("telnet is not allowed here")
        return packet.allow()
