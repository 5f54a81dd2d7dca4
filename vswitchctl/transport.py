"""How a call gets to the daemon: method paths, channel options, and the descriptor that runs `calls` on a
client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import Message

PACKAGE = "vswitch.v1"

# Called before each call with its method ("vswitch.v1.PortService/GetPort") and its request.
CallObserver = Callable[[str, Message], None]

# A daemon that has been started again must be found at once, not after the channel's minutes of back-off.
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    # A channel of its own back-off, not that of an earlier one to a daemon that was not there yet.
    ("grpc.use_local_subchannel_pool", 1),
    # As much as the daemon takes: gRPC's own 4 MiB are less than 256 large sends.
    ("grpc.max_receive_message_length", 18 << 20),
)


def path_of(method: str) -> str:
    """The HTTP/2 path of "Service/Method"."""
    return f"/{PACKAGE}.{method}"


def target_of(socket: Path) -> str:
    """What a gRPC channel calls a Unix socket."""
    return f"unix:{socket}"
