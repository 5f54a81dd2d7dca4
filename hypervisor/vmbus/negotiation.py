"""Version negotiation: what an INITIATE_CONTACT is answered, as one pure function.

Supported are 2.4 (Windows 8) to 6.0 (Copper): the older ones need the shared event and the interrupt page,
which no guest of today uses. A version is refused in the 16-byte form; a known version with impossible
parameters gets a failed connection state (Linux include/linux/hyperv.h, vmbus_channel_version_response).
"""

from __future__ import annotations

from dataclasses import dataclass

from vswitch_wire import vmbus
from vswitch_wire.synic import HV_SYNIC_SINT_COUNT
from vswitch_wire.vmbus import VmbusVersion

MESSAGE_CONNECTION_ID = 0x41
"""Where messages go from version 5.0 on; VERSION_RESPONSE tells it."""
SUPPORTED_FEATURES = vmbus.FEATURE_CLIENT_ID
OLDEST_VERSION = VmbusVersion.WIN8
NEWEST_VERSION = VmbusVersion.COPPER


@dataclass(frozen=True, slots=True)
class Connection:
    """What INITIATE_CONTACT agreed on."""

    version: VmbusVersion
    vp: int
    sint: int
    features: int


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The answer, where it goes, and the connection if there is one."""

    response: vmbus.VersionResponse
    vp: int
    sint: int
    connection: Connection | None


def negotiate(
    message: vmbus.InitiateContact,
    processors: int,
    oldest: VmbusVersion = OLDEST_VERSION,
    newest: VmbusVersion = NEWEST_VERSION,
) -> Negotiated:
    """Answer a contact of a guest with this many virtual processors."""
    vp_exists = message.target_vp < processors
    # Before 8.1 messages go to processor 0 whatever is asked.
    honoured = message.version >= VmbusVersion.WIN8_1
    vp = message.target_vp if honoured and vp_exists else 0
    sint = vmbus.VMBUS_MESSAGE_SINT
    try:
        version = VmbusVersion(message.version)
    except ValueError:
        version = VmbusVersion.V1
    if not oldest <= version <= newest:
        return Negotiated(vmbus.VersionResponse(version_supported=False), vp, sint, None)
    valid = bool(message.parent_to_child_monitor_gpa) == bool(message.child_to_parent_monitor_gpa)
    valid = valid and (vp_exists or not honoured)
    if version >= VmbusVersion.WIN10_RS3_1:
        # The answer goes where the guest listens. A connection has the SINT that every guest uses: a virtual
        # machine monitor binds the interrupt eventfds to it before there is any contact.
        valid = valid and message.sint == sint
        sint = message.sint if 0 < message.sint < HV_SYNIC_SINT_COUNT else sint
    if version >= VmbusVersion.WIN10_RS4:
        valid = valid and message.vtl == 0
    copper = version >= VmbusVersion.COPPER
    features = message.feature_flags & SUPPORTED_FEATURES if copper else 0
    response = vmbus.VersionResponse(
        version_supported=True,
        connection_state=(
            vmbus.CONNECTION_STATE_SUCCESSFUL if valid else vmbus.CONNECTION_STATE_FAILED_UNKNOWN
        ),
        selected_version_or_connection_id=(
            MESSAGE_CONNECTION_ID if version >= VmbusVersion.WIN10_RS3_1 else int(version)
        ),
        feature_flags=features if copper else None,
    )
    return Negotiated(response, vp, sint, Connection(version, vp, sint, features) if valid else None)
