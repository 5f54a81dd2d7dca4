"""Each host may open one TCP connection per second; further ones are dropped until the second is over.

The verdict for a SYN depends on earlier frames, so it is kept in `self` and never cached: the switch asks
for each SYN. All other frames are judged once per flow.
"""

from vswitch.extension import Filter, Packet, Verdict


class OneConnectionPerSecond(Filter):
    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def ingress(self, packet: Packet) -> Verdict:
        if not packet.tcp or not packet.tcp.syn or packet.tcp.ack:
            return packet.allow()
        source = packet.eth.src
        if packet.now - self.last.get(source, float("-inf")) < 1.0:
            return packet.drop("one new connection per second")
        if not packet.tracing:
            if len(self.last) > 1000:
                self.last.clear()
            self.last[source] = packet.now
        return packet.allow()
