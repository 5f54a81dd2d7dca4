"""The NetVSC driver against a scripted host: order, refusals, offloads, indications, teardown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from scripted_host import MAC, Host, until

from netvsc.driver import DriverError
from vswitch_wire import ndis, nvsp, packet, rndis

if TYPE_CHECKING:
    from conftest import Nic

FULL = ndis.Offload(0x155, 0x155, 0x55, 0x55, 0xF53C, 2, 0xF53C, 2, 5, True, True)


async def test_the_negotiation_follows_the_stock_drivers_order(host: Host, nic: Nic) -> None:
    properties = await nic.driver.start(1500)
    assert host.log == [
        "open",
        "Init",
        "SendNdisConfig",
        "SendNdisVersion",
        "SendReceiveBuffer",
        "SendSendBuffer",
        "INITIALIZE",
    ]
    assert host.oids == [
        ndis.OID_GEN_MAXIMUM_FRAME_SIZE,
        ndis.OID_802_3_PERMANENT_ADDRESS,
        ndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES,
        ndis.OID_TCP_OFFLOAD_PARAMETERS,
        ndis.OID_GEN_MEDIA_CONNECT_STATUS,
        ndis.OID_GEN_LINK_SPEED,
        ndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES,
    ]
    assert (properties.mac, properties.mtu, properties.connected) == (MAC, 1500, True)
    assert properties.link_speed == 10_000_000_000


@pytest.mark.parametrize("newest", [nvsp.NvspVersion.V5, nvsp.NvspVersion.V2, nvsp.NvspVersion.V1])
async def test_versions_are_tried_newest_first_down_to_the_one_the_host_takes(
    host: Host, nic: Nic, newest: nvsp.NvspVersion
) -> None:
    host.refuse_above = newest
    properties = await nic.driver.start(1500)
    assert properties.nvsp_version == host.version == newest
    assert ("SendNdisConfig" in host.log) == (newest >= nvsp.NvspVersion.V2)


async def test_a_host_that_takes_no_version_is_named_in_the_error(host: Host, nic: Nic) -> None:
    host.refuse_above = 0  # type: ignore[assignment]
    with pytest.raises(
        DriverError, match=f"NIC {host.offer.instance_id}: the host refused every NVSP version"
    ):
        await nic.driver.start(1500)


async def test_a_smaller_host_lowers_the_mtu(host: Host, nic: Nic) -> None:
    host.mtu = 1414
    assert (await nic.driver.start(9000)).mtu == 1400


async def test_what_the_host_offers_in_full_is_enabled(host: Host, nic: Nic) -> None:
    host.offload = FULL
    properties = await nic.driver.start(1500)
    assert (properties.checksum, properties.lso4, properties.lso6, properties.rsc) == (True,) * 4
    parameters = ndis.OffloadParameters.unpack(host.sets[ndis.OID_TCP_OFFLOAD_PARAMETERS])
    assert (
        parameters.tcp4_checksum,
        parameters.udp6_checksum,
        parameters.lso_v2_ipv4,
        parameters.rsc_ipv4,
    ) == (
        4,
        4,
        2,
        2,
    )


async def test_what_the_host_does_not_offer_stays_off(host: Host, nic: Nic) -> None:
    properties = await nic.driver.start(1500)
    assert not properties.checksum
    assert not properties.rsc
    parameters = ndis.OffloadParameters.unpack(host.sets[ndis.OID_TCP_OFFLOAD_PARAMETERS])
    assert (parameters.tcp4_checksum, parameters.lso_v2_ipv4, parameters.rsc_ipv4) == (1, 1, 1)


async def test_receive_sections_beyond_the_buffer_are_refused(
    host: Host, nic: Nic, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = host.complete

    def lie(item: packet.Packet, message: nvsp.NvspMessage) -> None:
        if isinstance(message, nvsp.SendReceiveBufferComplete):
            message = nvsp.SendReceiveBufferComplete(1, (nvsp.ReceiveBufferSection(0, 1 << 20, 1 << 20, 0),))
        real(item, message)

    monkeypatch.setattr(host, "complete", lie)
    with pytest.raises(DriverError, match="do not fit the buffer"):
        await nic.driver.start(1500)


async def test_indications_move_the_carrier(host: Host, nic: Nic) -> None:
    await nic.driver.start(1500)
    for status in (rndis.RNDIS_STATUS_MEDIA_DISCONNECT, rndis.RNDIS_STATUS_MEDIA_CONNECT):
        host.send_rndis(rndis.IndicateStatus(status).pack())
    host.interrupt()
    await until(lambda: nic.carriers == [False, True])


async def test_the_filter_is_set_when_the_interface_opens_and_cleared_before_it_halts(
    host: Host, nic: Nic
) -> None:
    await nic.driver.start(1500)
    await nic.driver.set_filter(True)
    assert host.sets[ndis.OID_GEN_CURRENT_PACKET_FILTER] == (0x0D).to_bytes(4, "little")
    await nic.driver.stop()
    host.serve()
    assert host.sets[ndis.OID_GEN_CURRENT_PACKET_FILTER] == bytes(4)
    assert sorted(host.log[-6:]) == sorted(
        ["HALT", "RevokeReceiveBuffer", "RevokeSendBuffer", "close", "teardown 0xe1e10", "teardown 0xe1e11"]
    )
    assert host.log.index("RevokeReceiveBuffer") < host.log.index("RevokeSendBuffer")
    assert host.log.index("HALT") < host.log.index("close")


async def test_every_page_comes_back_when_the_nic_is_stopped(host: Host, nic: Nic) -> None:
    before = list(host.allocator.free_pages)
    await nic.driver.start(1500)
    assert len(host.allocator.free_pages) < len(before) - 1000
    await nic.driver.stop()
    assert host.allocator.free_pages == before


async def test_requests_in_flight_fail_when_the_offer_is_rescinded(
    host: Host, nic: Nic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "on_control", lambda message: None)
    starting = asyncio.ensure_future(nic.driver.start(1500))
    await until(lambda: "SendSendBuffer" in host.log and bool(host.sent))
    nic.driver.abandon("its offer was rescinded")
    with pytest.raises(DriverError, match="its offer was rescinded"):
        await starting
    await nic.driver.released()
    assert host.log[-3:] == ["close", "teardown 0xe1e10", "teardown 0xe1e11"]


async def test_a_host_that_breaks_the_ring_costs_the_channel_and_is_told(host: Host, nic: Nic) -> None:
    await nic.driver.start(1500)
    assert host.channel is not None
    downstream = host.memory.view(host.channel.ring_pfns[16:], 0, 16 * 4096)
    downstream.store_u32(0, 0xFFFFFFF8)
    host.interrupt()
    await until(lambda: bool(nic.faults))
    assert "index" in nic.faults[0]
