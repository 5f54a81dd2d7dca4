"""Integration services: what stock guests' hv_utils talks to."""

from hypervisor.integration.heartbeat import HeartbeatState
from hypervisor.integration.kvp_messages import IpInfo, KvpPool
from hypervisor.integration.service import IntegrationError
from hypervisor.integration.services import IntegrationServices

__all__ = ["HeartbeatState", "IntegrationError", "IntegrationServices", "IpInfo", "KvpPool"]
