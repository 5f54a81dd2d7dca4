"""The VMBus connection: version negotiation, contacts that forget everything, offers in order, unload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
import pytest_asyncio
from hypervisor_world import PAGE, EchoDevice, RawGuest, World, until

from vswitch_wire import vmbus
from vswitch_wire.gpadl import GpaRange, encode_gpadl
from vswitch_wire.hypercall import HvStatus
from vswitch_wire.vmbus import VmbusVersion

MODERN = [v for v in VmbusVersion if v >= VmbusVersion.WIN10_RS3_1]
OLD = [VmbusVersion.WIN8, VmbusVersion.WIN8_1, VmbusVersion.WIN10, VmbusVersion.WIN10_RS3_0]


@pytest_asyncio.fixture
async def guest(world: World) -> AsyncIterator[RawGuest]:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20, vp_count=2)
    guest = await (await RawGuest(partition).attach()).start_synic()
    yield guest
    guest.close()


@pytest.mark.parametrize("version", OLD)
async def test_versions_below_5_are_accepted_and_echoed(guest: RawGuest, version: VmbusVersion) -> None:
    answer = await guest.contact(version)
    assert answer == vmbus.VersionResponse(True, 0, version)


@pytest.mark.parametrize("version", MODERN)
async def test_versions_from_5_on_name_the_connection_for_messages(
    guest: RawGuest, version: VmbusVersion
) -> None:
    answer = await guest.contact(version)
    assert (answer.version_supported, answer.connection_state) == (True, 0)
    assert (answer.feature_flags is not None) == (version >= VmbusVersion.COPPER)
    connection = answer.selected_version_or_connection_id
    assert await guest.post(vmbus.RequestOffers(), connection) == 0
    assert isinstance(await guest.message(), vmbus.AllOffersDelivered)


@pytest.mark.parametrize("version", [0x0000000D, 0x00010001, 0x00020003, 0x00060001, 0x00070000, 0])
async def test_other_versions_are_refused_in_the_short_form(guest: RawGuest, version: int) -> None:
    await guest.post(vmbus.InitiateContact(version, 0, 2), 4)
    answer = await guest.message()
    assert answer == vmbus.VersionResponse(False, 0, 0)
    assert len(answer.pack()) == 16


@pytest.mark.parametrize(
    "contact",
    [
        vmbus.InitiateContact(VmbusVersion.WIN8_1, 5, 0),
        vmbus.InitiateContact(VmbusVersion.WIN8_1, 0, 0, parent_to_child_monitor_gpa=PAGE),
        vmbus.InitiateContact(VmbusVersion.WIN10_RS3_1, 0, 0),
        vmbus.InitiateContact(VmbusVersion.WIN10_RS3_1, 0, 16),
        vmbus.InitiateContact(VmbusVersion.WIN10_RS3_1, 0, 5),
        vmbus.InitiateContact(VmbusVersion.WIN10_RS4, 0, vmbus.InitiateContact.target(2, vtl=1)),
    ],
)
async def test_a_known_version_with_impossible_parameters_is_a_failed_connection(
    guest: RawGuest, contact: vmbus.InitiateContact
) -> None:
    await guest.post(contact, 4)
    answer = await guest.message()
    assert isinstance(answer, vmbus.VersionResponse)
    assert (answer.version_supported, answer.connection_state) == (
        True,
        vmbus.CONNECTION_STATE_FAILED_UNKNOWN,
    )
    assert guest.partition.vmbus.connection is None


async def test_before_8_1_messages_go_to_processor_0_whatever_is_asked(guest: RawGuest) -> None:
    assert (await guest.contact(VmbusVersion.WIN8, target_vp=1)).version_supported
    assert guest.partition.vmbus.connection is not None
    assert guest.partition.vmbus.connection.vp == 0


async def test_offers_come_in_stable_order_then_the_marker_once(world: World, guest: RawGuest) -> None:
    devices = [EchoDevice(UUID(int=number)) for number in (3, 1, 2)]
    for device in devices:
        await guest.partition.vmbus.offer(device)
    order = []
    for _ in range(2):
        await guest.contact()
        await guest.post(vmbus.RequestOffers())
        offers = [await guest.message() for _ in range(3)]
        assert isinstance(await guest.message(), vmbus.AllOffersDelivered)
        order.append([(o.instance_id.int, o.relid) for o in offers if isinstance(o, vmbus.OfferChannel)])
    assert [instance for instance, _ in order[0]] == [1, 2, 3]
    assert order[0] == order[1]
    assert all(relid for _, relid in order[0])


async def test_asking_for_offers_twice_is_an_error_without_an_answer(guest: RawGuest) -> None:
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    assert isinstance(await guest.message(), vmbus.AllOffersDelivered)
    await guest.post(vmbus.RequestOffers())
    assert await guest.silent()
    assert guest.partition.vmbus.protocol_errors == 1


async def test_a_device_that_comes_later_is_offered_without_a_second_marker(guest: RawGuest) -> None:
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    assert isinstance(await guest.message(), vmbus.AllOffersDelivered)
    await guest.partition.vmbus.offer(EchoDevice())
    offer = await guest.message()
    assert isinstance(offer, vmbus.OfferChannel)
    assert offer.flags & (vmbus.VMBUS_CHANNEL_CONFIDENTIAL_RING | 4) == 0
    assert await guest.silent()


async def test_the_same_device_cannot_be_offered_twice(guest: RawGuest) -> None:
    await guest.partition.vmbus.offer(EchoDevice(UUID(int=7)))
    with pytest.raises(ValueError, match="already offered"):
        await guest.partition.vmbus.offer(EchoDevice(UUID(int=7)))


async def open_channel(guest: RawGuest, device: EchoDevice) -> int:
    offer = await guest.partition.vmbus.offer(device)
    await guest.contact()
    await guest.post(vmbus.RequestOffers())
    assert isinstance(await guest.message(), vmbus.OfferChannel)
    await guest.message()
    await share(guest, offer.relid, 0xE1E10, range(16, 20))
    await guest.post(vmbus.OpenChannel(offer.relid, 9, 0xE1E10, 0, 2))
    assert await guest.message() == vmbus.OpenChannelResult(offer.relid, 9, 0)
    return offer.relid


async def share(guest: RawGuest, relid: int, gpadl: int, pages: range) -> None:
    for message in encode_gpadl(relid, gpadl, (GpaRange(len(pages) * PAGE, 0, tuple(pages)),)):
        await guest.post(message)
    assert await guest.message() == vmbus.GpadlCreated(relid, gpadl, 0)


async def test_a_new_contact_forgets_everything_once_the_device_let_go(guest: RawGuest) -> None:
    device = EchoDevice()
    await open_channel(guest, device)
    device.gate.clear()
    assert await guest.post(vmbus.InitiateContact(VmbusVersion.WIN10, 0, 0)) == 0
    assert await guest.silent()
    assert device.events == ["open 0"]
    device.gate.set()
    assert isinstance(await guest.message(), vmbus.VersionResponse)
    assert device.events == ["open 0", "close 0"]
    assert len(guest.partition.vmbus.gpadls) == 0
    # The same relid, offered anew, without a rescind.
    await guest.post(vmbus.RequestOffers())
    assert isinstance(await guest.message(), vmbus.OfferChannel)


async def test_messages_during_a_reset_wait_in_the_ports_16_buffers(guest: RawGuest) -> None:
    device = EchoDevice()
    await open_channel(guest, device)
    device.gate.clear()
    await guest.post(vmbus.InitiateContact(VmbusVersion.WIN10, 0, 0))
    statuses = [await guest.post(vmbus.RequestOffers()) for _ in range(17)]
    assert statuses == [0] * 16 + [HvStatus.INSUFFICIENT_BUFFERS]
    device.gate.set()
    kinds = [type(await guest.message()) for _ in range(3)]
    assert kinds == [vmbus.VersionResponse, vmbus.OfferChannel, vmbus.AllOffersDelivered]


async def test_a_lost_door_leaves_no_contact_that_waited(guest: RawGuest) -> None:
    device = EchoDevice()
    await open_channel(guest, device)
    server = guest.partition.vmbus
    device.gate.clear()

    async def lose() -> None:
        await server.detached()
        assert not server.resetting

    contact = vmbus.InitiateContact(VmbusVersion.WIN10, 0, 0)
    await guest.post(contact)
    losing = asyncio.ensure_future(lose())
    await asyncio.sleep(0)
    # While the first one still closes the device.
    for _ in range(8):
        await guest.post(contact)
    device.gate.set()
    await losing
    assert device.events == ["open 0", "close 0"]


async def test_unload_answers_after_all_memory_was_let_go(guest: RawGuest) -> None:
    device = EchoDevice()
    await open_channel(guest, device)
    device.gate.clear()
    await guest.post(vmbus.Unload())
    assert await guest.silent()
    device.gate.set()
    assert isinstance(await guest.message(), vmbus.UnloadResponse)
    assert device.events == ["open 0", "close 0"]
    # Also when there is no connection.
    await guest.post(vmbus.Unload())
    assert isinstance(await guest.message(), vmbus.UnloadResponse)


async def test_a_guest_that_ends_no_message_is_throttled_and_nobody_else(
    world: World, guest: RawGuest
) -> None:
    await guest.contact()
    statuses = []
    for number in range(100):
        # Each asks for an answer; the guest takes none of them out of its slot.
        statuses.append(await guest.post(vmbus.GpadlHeader(5, number + 1, 16, 1, bytes(16))))
    assert statuses[-1] == HvStatus.INSUFFICIENT_BUFFERS
    assert statuses.count(HvStatus.SUCCESS) <= 64 + 16 + 2
    assert guest.partition.synic.queued() <= 65
    other = await (await world.guest("b")).boot()
    assert other.vmbus.version == VmbusVersion.COPPER


MALFORMED = {
    "empty": b"",
    "short header": bytes(7),
    "type 0": bytes(8),
    "unknown type": (99).to_bytes(4, "little") + bytes(200),
    "short open": (5).to_bytes(4, "little") + bytes(20),
    "short contact": (14).to_bytes(4, "little") + bytes(8),
    "host's own message": vmbus.GpadlCreated(1, 1, 0).pack(),
    "offer from the guest": vmbus.OfferChannel(UUID(int=1), UUID(int=2), 1, 1).pack(),
    "relid nobody offered": vmbus.CloseChannel(77).pack(),
    "body of no gpadl": vmbus.GpadlBody(0, 5, bytes(16)).pack(),
    "open of an unknown relid": vmbus.OpenChannel(77, 1, 1, 0, 2).pack(),
    "release of an unknown relid": vmbus.RelidReleased(2000).pack(),
    "pause": vmbus.Pause().pack(),
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_or_misplaced_message_is_counted_and_nothing_else(
    guest: RawGuest, payload: bytes
) -> None:
    await guest.contact()
    assert await guest.post(payload) == HvStatus.SUCCESS
    assert await guest.silent()
    assert guest.partition.vmbus.protocol_errors == 1
    assert guest.partition.vmbus.last_error
    assert (await guest.contact()).version_supported


@pytest.mark.parametrize("message", [vmbus.RequestOffers(), vmbus.CloseChannel(1), vmbus.ModifyChannel(1, 0)])
async def test_nothing_is_served_without_a_connection(guest: RawGuest, message: vmbus.ChannelMessage) -> None:
    await guest.post(message)
    assert await guest.silent()
    assert "without a connection" in guest.partition.vmbus.last_error


async def test_a_socket_request_is_refused_in_its_own_protocol(guest: RawGuest) -> None:
    await guest.contact(VmbusVersion.WIN10_RS3_0)
    await guest.post(vmbus.TlConnectRequest(UUID(int=1), UUID(int=2)))
    answer = await guest.message()
    assert answer == vmbus.TlConnectResult(UUID(int=1), UUID(int=2), vmbus.STATUS_CONNECTION_REFUSED)


async def test_every_message_is_seen_by_a_tap(guest: RawGuest) -> None:
    seen: list[tuple[str, bytes, int]] = []
    guest.partition.vmbus.tap.append(lambda direction, data, when: seen.append((direction, data, when)))
    answer = await guest.contact()
    assert [(direction, data[0]) for direction, data, _ in seen] == [("in", 14), ("out", 15)]
    assert seen[1][1] == answer.pack()
    assert seen[0][2] > 1_700_000_000 * 10**9


async def test_relids_are_never_0_and_stay_with_their_device(world: World) -> None:
    guest = await (await world.guest("b")).boot()
    device = EchoDevice()
    offer = await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    relid = offer.relid
    await guest.partition.vmbus.rescind(offer)
    await until(lambda: not guest.partition.vmbus.channels)
    other = await guest.partition.vmbus.offer(EchoDevice())
    again = await guest.partition.vmbus.offer(device)
    assert again.relid == relid
    assert other.relid not in (0, relid)
