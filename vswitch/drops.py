"""Why a frame was not delivered: the Hyper-V switch's drop reasons with the codes that Pktmon prints.

Codes 0..38 are the switch's own, 201..204 general, 401..404 NetVSC's, 701..719 the virtual filtering
platform's
(Windows Packet Monitor, `PACKETMONITOR` drop reasons; WMI class `Msvm_VirtualNetworkAdapterDropReasons`).
The native twin is `native/switch/src/drops.rs`; a test holds the two equal.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["DropReason"]


class DropReason(IntEnum):
    """One reason per drop; the value is the Windows code, `label` the Windows name, `meaning` one clause."""

    UNKNOWN = 0
    INVALID_DATA = 1
    INVALID_PACKET = 2
    RESOURCES = 3
    NOT_READY = 4
    DISCONNECTED = 5
    NOT_ACCEPTED = 6
    BUSY = 7
    FILTERED = 8
    FILTERED_VLAN = 9
    UNAUTHORIZED_VLAN = 10
    UNAUTHORIZED_MAC = 11
    FAILED_SECURITY_POLICY = 12
    FAILED_PVLAN_SETTING = 13
    QOS = 14
    IPSEC = 15
    MAC_SPOOFING = 16
    DHCP_GUARD = 17
    ROUTER_GUARD = 18
    BRIDGE_RESERVED = 19
    VIRTUAL_SUBNET_ID = 20
    REQUIRED_EXTENSION_MISSING = 21
    INVALID_CONFIG = 22
    MTU_MISMATCH = 23
    NATIVE_FWDING_REQ = 24
    INVALID_VLAN_FORMAT = 25
    INVALID_DEST_MAC = 26
    INVALID_SOURCE_MAC = 27
    INVALID_FIRST_NB_TOO_SMALL = 28
    WNV = 29
    STORM_LIMIT = 30
    INJECTED_ICMP = 31
    FAILED_DESTINATION_LIST_UPDATE = 32
    NIC_DISABLED = 33
    FAILED_PACKET_FILTER = 34
    SWITCH_DATA_FLOW_DISABLED = 35
    FILTERED_ISOLATION_UNTAGGED = 36
    INVALID_PD_QUEUE = 37
    LOW_POWER_PACKET_FILTER = 38
    PAUSE = 201
    RESET = 202
    SEND_ABORTED = 203
    PROTOCOL_NOT_BOUND = 204
    MICROPORT_ERROR = 401
    VF_NOT_READY = 402
    MICROPORT_NOT_READY = 403
    VMBUS_ERROR = 404
    ARP_GUARD = 701
    ARP_LIMITER = 702
    DHCP_LIMITER = 703
    BLOCK_BROADCAST = 704
    BLOCK_NON_IP = 705
    ARP_FILTER = 706
    IPV4_GUARD = 707
    IPV6_GUARD = 708
    MAC_GUARD = 709
    BROADCAST_NO_DESTINATIONS = 710
    UNICAST_NO_DESTINATION = 711
    UNICAST_PORT_NOT_READY = 712
    SWITCH_CALLBACK_FAILED = 713
    ICMPV6_LIMITER = 714
    INTERCEPT = 715
    INTERCEPT_BLOCK = 716
    NDP_GUARD = 717
    PORT_BLOCKED = 718
    NIC_SUSPENDED = 719

    @property
    def label(self) -> str:
        """The Windows name, e.g. `InvalidSourceMac`."""
        return _LABELS[self]

    @property
    def meaning(self) -> str:
        """What it means, in a few words."""
        return _MEANINGS.get(self, self.label)


_SPELLINGS = {
    "MAC": "Mac",
    "MTU": "MTU",
    "VLAN": "VLAN",
    "WNV": "Wnv",
    "NB": "NB",
    "PD": "PD",
    "VMBUS": "VMBus",
}
_IRREGULAR = {
    DropReason.UNAUTHORIZED_MAC: "UnauthorizedMAC",
    DropReason.INVALID_VLAN_FORMAT: "InvalidVlanFormat",
    DropReason.NDP_GUARD: "NDPGuard",
}
_LABELS = {
    reason: _IRREGULAR.get(reason)
    or "".join(_SPELLINGS.get(word, word.capitalize()) for word in reason.name.split("_"))
    for reason in DropReason
}
_MEANINGS = {
    DropReason.UNKNOWN: "unclassified",
    DropReason.INVALID_DATA: "unusable data",
    DropReason.INVALID_PACKET: "malformed packet",
    DropReason.RESOURCES: "no memory or buffers",
    DropReason.NOT_READY: "not yet up",
    DropReason.DISCONNECTED: "the port's NIC is not connected",
    DropReason.NOT_ACCEPTED: "the receiver refused it",
    DropReason.BUSY: "busy",
    DropReason.FILTERED: "dropped by an extension",
    DropReason.BRIDGE_RESERVED: "sent to a group address that bridges never forward",
    DropReason.REQUIRED_EXTENSION_MISSING: "a fail-closed extension gave no verdict",
    DropReason.MTU_MISMATCH: "larger than the destination's MTU",
    DropReason.INVALID_SOURCE_MAC: "the source address is a group address or zero",
    DropReason.BROADCAST_NO_DESTINATIONS: "no other connected port to flood to",
    DropReason.UNICAST_NO_DESTINATION: "the destination is behind the port it came from",
}
