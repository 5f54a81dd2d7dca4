"""The pseudo header of a captured VMBus record: link type USER0 (147) in pcapng files of `capture
--vmbus`.
"""

from __future__ import annotations

from scapy.config import conf
from scapy.fields import ByteEnumField, ByteField, LEIntField
from scapy.packet import Packet, bind_layers

from netvsc.scapy_layers.vmbus import VMBusMessage, VMBusPacket

LINKTYPE_USER0 = 147


class VMBusCaptured(Packet):
    """Sender and kind of what follows; `relid` is the channel of a ring packet."""

    name = "captured VMBus"
    fields_desc = [
        ByteField("version", 1),
        ByteEnumField("sender", 0, {0: "guest", 1: "host"}),
        ByteEnumField("kind", 1, {1: "channel message", 2: "ring packet"}),
        ByteField("reserved", 0),
        LEIntField("relid", 0),
    ]


bind_layers(VMBusCaptured, VMBusMessage, kind=1)
bind_layers(VMBusCaptured, VMBusPacket, kind=2)
conf.l2types.register(LINKTYPE_USER0, VMBusCaptured)


def summary(data: bytes) -> str:
    """What a captured record is, in one line: its innermost message and that one's first fields."""
    try:
        layer: Packet = VMBusCaptured(data)
        names = []
        while layer.payload and layer.payload.name not in ("Raw", "Padding"):
            layer = layer.payload
            names.append(str(layer.name))
        if not names:
            return "nothing known"
        shown = [
            f"{field.name}={layer.sprintf(f'%{field.name}%')}"
            for field in layer.fields_desc[:6]
            if isinstance(getattr(layer, field.name), int) and field.name not in ("padding", "reserved")
        ]
        return " ".join([names[-1], *shown])
    except Exception as error:  # scapy raises what its fields raise on bytes that are cut short
        return f"malformed ({type(error).__name__})"
