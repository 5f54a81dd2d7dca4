"""The integration services against a guest that answers as stock hv_utils does, and against hostile ones."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import stock_utils
from hypervisor_world import PAGE, Guest, World, until
from stock_utils import HeartbeatDriver, KvpDriver, ShutdownDriver, TimesyncDriver

from hypervisor import ChannelState, ManualClock
from hypervisor.integration import HeartbeatState, IntegrationError, IntegrationServices, KvpPool
from hypervisor.integration.service import STRAY_LIMIT
from netvsc.vmbus import ChannelRefusedError
from vswitch_wire import packet
from vswitch_wire.memory import signal_fd

HOUR_NS = 3600 * 10**9


class WarpClock(ManualClock):
    """A clock whose wall time can be set apart from the time since boot."""

    def __init__(self) -> None:
        super().__init__()
        self.wall_offset_ns = 1_800_000_000 * 10**9

    def wall_ns(self) -> int:
        return super().wall_ns() + self.wall_offset_ns


class Bench:
    """A partition with its services, and a guest whose drivers a test opens."""

    def __init__(self, guest: Guest, clock: WarpClock) -> None:
        self.guest = guest
        self.clock = clock
        self.changes = 0
        self.services = IntegrationServices(guest.partition, clock)
        self.services.on_changed.append(self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def start(self) -> Bench:
        """Offer all four; the drivers wait to be opened."""
        await self.services.offer()
        await until(lambda: len(self.guest.offers) == 4)
        self.shutdown = ShutdownDriver(self.guest)
        self.timesync = TimesyncDriver(self.guest, self.guest.partition.synic.reference_time)
        self.heartbeat = HeartbeatDriver(self.guest)
        self.kvp = KvpDriver(self.guest)
        return self

    async def opened(self, driver: Any, class_id: Any, name: str) -> None:
        """A driver opens and has negotiated."""
        await driver.open(class_id)
        await until(lambda: name in self.services.versions)

    async def advance(self, seconds: float, condition: Callable[[], bool] | None = None) -> None:
        """Move the clock on in small steps, so that answers have time to come between."""
        for _ in range(int(seconds * 10)):
            self.clock.advance(0.1)
            await asyncio.sleep(0.002)
            if condition is not None and condition():
                return
        if condition is not None:
            await until(condition)


@pytest_asyncio.fixture(params=["python", "native"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    import vswitch_native

    if request.param == "native" and not vswitch_native.AVAILABLE:
        pytest.skip(vswitch_native.WHY)
    clock = WarpClock()
    world = World(tmp_path / "run", engine=request.param, clock=clock)
    guest = await (await world.guest()).boot()
    yield await Bench(guest, clock).start()
    await world.close()


# --- offers and negotiation ---


async def test_the_four_services_are_offered_as_pipes_with_the_ids_stock_guests_know(bench: Bench) -> None:
    assert {offer.class_id for offer in bench.guest.offers} == {
        stock_utils.SHUTDOWN,
        stock_utils.TIMESYNC,
        stock_utils.HEARTBEAT,
        stock_utils.KVP,
    }
    for offer in bench.guest.offers:
        assert offer.flags == 0x11
        assert offer.user_data[:4] == struct.pack("<I", 4)
    await bench.services.offer()
    assert len(bench.guest.partition.vmbus.channels) == 4


async def test_each_service_agrees_on_the_newest_version_of_a_stock_guest(bench: Bench) -> None:
    for driver, class_id, name in (
        (bench.shutdown, stock_utils.SHUTDOWN, "shutdown"),
        (bench.timesync, stock_utils.TIMESYNC, "time sync"),
        (bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat"),
        (bench.kvp, stock_utils.KVP, "key-value exchange"),
    ):
        await bench.opened(driver, class_id, name)
        assert not driver.errors
    assert bench.services.versions == {
        "shutdown": "3.2",
        "time sync": "4.0",
        "heartbeat": "3.0",
        "key-value exchange": "4.0",
    }
    assert bench.guest.partition.vmbus.protocol_errors == 0


@pytest.mark.parametrize("version", [(1, 0), (3, 0), (3, 1)])
async def test_an_older_guest_gets_its_version(bench: Bench, version: tuple[int, int]) -> None:
    bench.shutdown.versions = [version]
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    assert bench.services.versions == {"shutdown": f"{version[0]}.{version[1]}"}
    await bench.services.shutdown()
    if version < (3, 1):
        with pytest.raises(IntegrationError, match=r"restarts need 3\.1; shut it down"):
            await bench.services.shutdown(reboot=True)


async def test_a_guest_that_knows_no_version_is_told_apart_from_one_without_driver(bench: Bench) -> None:
    with pytest.raises(IntegrationError, match="load hv_utils in the guest"):
        await bench.services.shutdown()
    bench.shutdown.versions = [(9, 9)]
    await bench.shutdown.open(stock_utils.SHUTDOWN)
    await asyncio.sleep(0.05)
    with pytest.raises(IntegrationError, match=r"knows none of the versions 1\.0, 3\.0, 3\.1, 3\.2"):
        await bench.services.shutdown()


async def test_a_guest_that_is_slow_to_negotiate_is_waited_for(bench: Bench) -> None:
    # Without hv_kvp_daemon the kernel leaves the negotiation in the ring.
    bench.kvp.registered = False
    bench.kvp.pools[2] = [("OSName", "Debian GNU/Linux")]
    await bench.kvp.open(stock_utils.KVP)
    await bench.advance(20)
    with pytest.raises(IntegrationError, match="has not answered the negotiation yet"):
        await bench.services.enumerate(KvpPool.AUTO)
    bench.kvp.register()
    await until(lambda: bench.services.guest_info == {"OSName": "Debian GNU/Linux"})


async def test_a_driver_unloaded_and_loaded_again_is_served_again(bench: Bench) -> None:
    for _ in range(3):
        await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
        await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)
        await bench.heartbeat.close()
        assert bench.services.versions == {}
        assert bench.services.heartbeat_state.value == "unknown"
        assert bench.services.heartbeat is not None


# --- shutdown ---


async def test_shutdown_and_restart_are_asked_for_and_agreed(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    await bench.services.shutdown()
    await bench.services.shutdown(force=False)
    await bench.services.shutdown(reboot=True)
    assert bench.shutdown.done == ["poweroff", "poweroff", "reboot"]
    assert bench.shutdown.errors == []


async def test_a_guest_that_refuses_or_is_silent_is_an_error_in_words(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    bench.shutdown.kind = 77
    with pytest.raises(IntegrationError, match=r"the guest refuses: failed \(0x80004005\)"):
        await bench.services.shutdown()
    bench.shutdown.mute = True
    asking = asyncio.ensure_future(bench.services.shutdown(seconds=10))
    await bench.advance(11, asking.done)
    with pytest.raises(IntegrationError, match="not answered within 10 s"):
        await asking
    # One request at a time, also when the guest owes an answer.
    with pytest.raises(IntegrationError, match="not answered the request before"):
        await bench.services.shutdown()
    bench.shutdown.mute = False
    bench.shutdown.interrupted()
    await asyncio.sleep(0.05)
    bench.shutdown.kind = 3
    await bench.services.shutdown()


async def test_closing_the_channel_ends_a_request_that_waits(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    bench.shutdown.mute = True
    asking = asyncio.ensure_future(bench.services.shutdown())
    await asyncio.sleep(0.02)
    await bench.shutdown.close()
    with pytest.raises(IntegrationError, match="closed the channel"):
        await asking


# --- time sync ---


async def test_the_clock_is_set_once_when_the_driver_opens_then_sampled(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: bool(bench.timesync.clock_ns))
    assert abs(bench.timesync.clock_ns[0] - bench.clock.wall_ns()) < 1000
    await bench.advance(21)
    assert len(bench.timesync.clock_ns) == 1
    assert bench.timesync.samples == 4
    assert bench.timesync.errors == []


@pytest.mark.parametrize("version", [(1, 0), (3, 0), (4, 0)])
async def test_a_clock_an_hour_wrong_is_set_on_request(bench: Bench, version: tuple[int, int]) -> None:
    bench.timesync.versions = [version]
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    await bench.services.sync_time()
    assert len(bench.timesync.clock_ns) == 2
    assert abs(bench.timesync.clock_ns[-1] - bench.clock.wall_ns()) < 1000


async def test_the_time_that_a_message_waited_is_added_with_version_4(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    bench.timesync.mute = True
    asking = asyncio.ensure_future(bench.services.sync_time())
    await asyncio.sleep(0.02)
    bench.clock.advance(3)
    bench.timesync.mute = False
    bench.timesync.interrupted()
    await asking
    assert abs(bench.timesync.clock_ns[-1] - bench.clock.wall_ns()) < 1000


async def test_the_guest_follows_when_the_hosts_own_clock_was_set(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    await bench.advance(6)
    bench.clock.wall_offset_ns -= HOUR_NS
    await bench.advance(6, lambda: len(bench.timesync.clock_ns) == 2)
    assert abs(bench.timesync.clock_ns[-1] - bench.clock.wall_ns()) < 2 * 10**9
    await bench.advance(11)
    assert len(bench.timesync.clock_ns) == 2


async def test_samples_go_on_after_a_request_that_was_given_up(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    bench.timesync.mute = True
    asking = asyncio.ensure_future(bench.services.sync_time())
    await bench.advance(20, asking.done)
    with pytest.raises(IntegrationError, match="not answered within 10 s"):
        await asking
    await bench.advance(11)
    bench.timesync.mute = False
    bench.timesync.interrupted()
    assert len(bench.timesync.clock_ns) == 2
    await bench.advance(6, lambda: bench.timesync.samples > 0)


async def test_a_guest_that_answers_no_sample_is_an_error_for_who_sets_its_clock(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    bench.timesync.mute = True
    await bench.advance(6)  # a sample waits for its answer
    asking = asyncio.ensure_future(bench.services.sync_time())
    await bench.advance(11)
    assert asking.done()
    with pytest.raises(IntegrationError, match="not answered within 10 s"):
        await asking


async def test_a_host_clock_that_was_set_is_followed_also_after_a_request_that_failed(bench: Bench) -> None:
    await bench.opened(bench.timesync, stock_utils.TIMESYNC, "time sync")
    await until(lambda: len(bench.timesync.clock_ns) == 1)
    bench.clock.wall_offset_ns += HOUR_NS
    bench.timesync.kind = 77  # refuses
    with pytest.raises(IntegrationError, match="the guest refuses"):
        await bench.services.sync_time()
    bench.timesync.kind = 4
    await bench.advance(6, lambda: len(bench.timesync.clock_ns) == 2)
    assert abs(bench.timesync.clock_ns[-1] - bench.clock.wall_ns()) < 2 * 10**9


async def test_without_the_guests_reference_counter_version_4_is_not_offered(tmp_path: Path) -> None:
    clock = WarpClock()
    world = World(tmp_path / "run", clock=clock)
    guest = await (await world.guest()).boot()
    services = IntegrationServices(guest.partition, clock, reference_time=False)
    await services.offer()
    await until(lambda: len(guest.offers) == 4)
    driver = TimesyncDriver(guest, guest.partition.synic.reference_time)
    await driver.open(stock_utils.TIMESYNC)
    await until(lambda: bool(driver.clock_ns))
    assert services.versions == {"time sync": "3.0"}
    assert abs(driver.clock_ns[0] - clock.wall_ns()) < 1000
    await world.close()


# --- heartbeat ---


async def test_a_guest_that_answers_is_ok_with_the_time_of_its_answer(bench: Bench) -> None:
    assert bench.services.heartbeat_state is HeartbeatState.UNKNOWN
    assert bench.services.heartbeat is None
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)
    changes = bench.changes
    await bench.advance(9)
    assert bench.services.heartbeat is not None
    age = datetime.fromtimestamp(bench.clock.wall_ns() / 1e9, UTC) - bench.services.heartbeat
    assert age.total_seconds() < 2.5
    assert bench.changes == changes


async def test_a_guest_that_stops_answering_is_lost_and_found_again(bench: Bench) -> None:
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)
    bench.heartbeat.mute = True
    await bench.advance(9)
    assert bench.services.heartbeat_state is HeartbeatState.OK
    last = bench.services.heartbeat
    await bench.advance(8, lambda: bench.services.heartbeat_state is HeartbeatState.LOST)
    # It is not flooded meanwhile: one request waits.
    await bench.advance(30)
    assert len(bench.heartbeat.reader.read()) == 1
    assert bench.services.heartbeat == last


async def test_a_late_answer_brings_the_heartbeat_back(bench: Bench) -> None:
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)
    bench.heartbeat.mute = True
    await bench.advance(15, lambda: bench.services.heartbeat_state is HeartbeatState.LOST)
    bench.heartbeat.mute = False
    bench.heartbeat.interrupted()
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)


async def test_a_guest_whose_ring_stays_full_is_lost_though_it_answered(bench: Bench) -> None:
    """It answers each request and never gives the ring's bytes back."""
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.OK)
    reader = bench.heartbeat.reader
    bench.heartbeat.reader = SimpleNamespace(read=reader.read, commit=lambda: False)  # type: ignore[assignment]
    for _ in range(200):
        bench.clock.advance(2.1)
        await asyncio.sleep(0.002)
        bench.heartbeat.interrupted()  # the host need not signal: the ring was not empty
        await asyncio.sleep(0.012)
        if bench.services.heartbeat_state is HeartbeatState.LOST:
            break
    assert bench.services.heartbeat_state is HeartbeatState.LOST
    reader.commit()
    bench.heartbeat.reader = reader
    await bench.advance(3, lambda: bench.services.heartbeat_state is HeartbeatState.OK)


async def test_a_wrong_number_is_no_heartbeat(bench: Bench) -> None:
    bench.heartbeat.callback = lambda buffer: True  # type: ignore[method-assign]
    await bench.heartbeat.open(stock_utils.HEARTBEAT)
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.LOST)
    assert bench.services.heartbeat is None


# --- key-value exchange ---

AUTO = [
    ("FullyQualifiedDomainName", "guest.example"),
    ("IntegrationServicesVersion", "3.1"),
    ("NetworkAddressIPv4", "10.0.0.2;10.0.1.2"),
    ("NetworkAddressIPv6", "fe80::1"),
    ("OSName", "Debian GNU/Linux"),
    ("OSVersion", "6.1.0"),
    ("ProcessorArchitecture", "x86_64"),
]


async def test_what_the_guest_says_of_itself_is_read_and_followed(bench: Bench) -> None:
    bench.kvp.pools[2] = list(AUTO)
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    await until(lambda: bench.services.guest_info == dict(AUTO))
    changes = bench.changes
    bench.kvp.pools[2][2] = ("NetworkAddressIPv4", "10.0.0.9")
    await bench.advance(17, lambda: bench.services.guest_info["NetworkAddressIPv4"] == "10.0.0.9")
    assert bench.changes == changes + 1
    assert bench.kvp.errors == []
    await bench.kvp.close()
    assert bench.services.guest_info == {}


async def test_other_pools_and_single_keys_are_read(bench: Bench) -> None:
    bench.kvp.pools = {2: [], 1: [("role", "web"), ("owner", "Ägidius")], 3: []}
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    assert await bench.services.enumerate(KvpPool.GUEST) == {"role": "web", "owner": "Ägidius"}
    assert await bench.services.enumerate(KvpPool.AUTO_EXTERNAL) == {}
    assert await bench.services.get(KvpPool.GUEST, "owner") == "Ägidius"
    with pytest.raises(IntegrationError, match=r"key 'none' of pool GUEST: no such item"):
        await bench.services.get(KvpPool.GUEST, "none")
    with pytest.raises(IntegrationError, match="at most 255 characters"):
        await bench.services.get(KvpPool.GUEST, "k" * 256)


async def test_an_adapters_addresses_are_asked_for_by_its_mac(bench: Bench) -> None:
    bench.kvp.adapters["00:15:5D:00:00:0A"] = (
        "10.0.0.2;fe80::215:5dff:fe00:a",
        "255.255.255.0;/64",
        "10.0.0.1;",
        "10.0.0.53;",
        1,
    )
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    info = await bench.services.ip_info("00:15:5d:00:00:0a")
    assert info.addresses == ("10.0.0.2", "fe80::215:5dff:fe00:a")
    assert info.subnets == ("255.255.255.0", "/64")
    assert (info.gateways, info.dns, info.dhcp) == (("10.0.0.1",), ("10.0.0.53",), True)
    with pytest.raises(IntegrationError, match=r"adapter 00:15:5d:00:00:0b: failed .*hv_kvp_daemon"):
        await bench.services.ip_info("00:15:5d:00:00:0b")


async def test_addresses_per_adapter_need_version_4(bench: Bench) -> None:
    bench.kvp.versions = [(3, 0)]
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    with pytest.raises(IntegrationError, match=r"speaks version 3\.0; addresses per adapter need 4\.0"):
        await bench.services.ip_info("00:15:5d:00:00:0a")


async def test_a_guest_without_end_of_keys_is_cut_short(bench: Bench) -> None:
    class Endless(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1 << 40

        def __getitem__(self, index: Any) -> Any:
            return f"key {index}", "x" * 100

    bench.kvp.pools[2] = Endless()
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    await until(lambda: bool(bench.services.guest_info), 20)
    assert len(bench.services.guest_info) == 256


async def test_text_for_a_terminal_is_defused(bench: Bench) -> None:
    bench.kvp.pools[2] = [("OS\x1b[2JName", "a\nb\x07\u202ec")]
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    await until(lambda: bool(bench.services.guest_info))
    assert bench.services.guest_info == {"OS\ufffd[2JName": "a\ufffdb\ufffd\ufffdc"}


@pytest.mark.parametrize(
    ("kind", "key_size", "value_size"),
    [(1, 514, 4), (1, 3, 4), (1, 4, 2050), (1, 4, 0xFFFFFFFF), (3, 4, 4), (0, 4, 4)],
)
async def test_sizes_that_lie_are_refused(bench: Bench, kind: int, key_size: int, value_size: int) -> None:
    def put(buffer: bytearray, at: int, key: str | None, value: str) -> None:
        struct.pack_into("<III", buffer, at, kind, key_size, value_size)

    bench.kvp.put = put  # type: ignore[method-assign,assignment]
    bench.kvp.pools[1] = [("a", "b")]
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    with pytest.raises(IntegrationError, match="key-value entry"):
        await bench.services.enumerate(KvpPool.GUEST)


@pytest.mark.parametrize(("kind", "shown"), [(4, "4294967295"), (8, "18446744073709551615")])
async def test_numbers_are_shown_as_text(bench: Bench, kind: int, shown: str) -> None:
    def put(buffer: bytearray, at: int, key: str | None, value: str) -> None:
        KvpDriver.put(buffer, at, key, value)
        struct.pack_into("<I", buffer, at, kind)
        buffer[at + 524 : at + 532] = b"\xff" * 8

    bench.kvp.put = put  # type: ignore[method-assign,assignment]
    bench.kvp.pools[1] = [("number", "x")]
    await bench.opened(bench.kvp, stock_utils.KVP, "key-value exchange")
    assert await bench.services.enumerate(KvpPool.GUEST) == {"number": shown}


# --- hostile guests ---


async def test_a_guest_that_answers_what_nobody_asked_loses_the_channel(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    for number in range(STRAY_LIMIT):
        bench.shutdown.send(packet.encode_inband(bytes(64), number, False))
    await until(lambda: bool(bench.guest.rescinds))
    assert "answer nothing" in bench.guest.partition.vmbus.last_error
    with pytest.raises(IntegrationError, match="load hv_utils"):
        await bench.services.shutdown()


async def test_a_lying_ring_costs_the_channel_and_ends_the_request(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    bench.shutdown.mute = True
    asking = asyncio.ensure_future(bench.services.shutdown())
    await asyncio.sleep(0.01)
    bench.shutdown.channel.memory.store_u32(bench.shutdown.channel.ring_pfns[0] * PAGE, 12289)
    signal_fd(bench.shutdown.channel.signal_fd)
    with pytest.raises(IntegrationError, match="write index"):
        await asking
    await until(lambda: bool(bench.guest.rescinds))


async def test_an_answer_of_another_kind_is_dropped_and_the_right_one_still_counts(bench: Bench) -> None:
    await bench.opened(bench.shutdown, stock_utils.SHUTDOWN, "shutdown")
    good = bench.shutdown.send

    def send(raw: bytes) -> None:
        body = bytearray(raw)
        body[16 + 12] = 9
        good(bytes(body))
        body = bytearray(raw)
        body[16 + 25] = 2
        good(bytes(body))
        good(packet.encode_completion(1, bytes(40)))
        good(raw)

    bench.shutdown.send = send  # type: ignore[method-assign]
    await bench.services.shutdown()
    assert bench.shutdown.done == ["poweroff"]


async def test_rings_that_are_too_small_or_too_large_are_refused(bench: Bench) -> None:
    (offer,) = [entry for entry in bench.guest.offers if entry.class_id == stock_utils.KVP]
    with pytest.raises(ChannelRefusedError):
        await bench.guest.vmbus.open(offer, ring_pages=2)
    assert "its messages need" in bench.guest.partition.vmbus.last_error
    with pytest.raises(ChannelRefusedError):
        await bench.guest.vmbus.open(offer, ring_pages=129)
    assert "at most 256" in bench.guest.partition.vmbus.last_error


async def test_a_guest_that_does_not_empty_its_ring_gets_one_message_and_no_more(bench: Bench) -> None:
    bench.timesync.mute = True
    await bench.timesync.open(stock_utils.TIMESYNC)
    await bench.advance(30)
    assert len(bench.timesync.reader.read()) == 1


async def test_close_takes_the_devices_away(bench: Bench) -> None:
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    await bench.services.close()
    await until(lambda: len(bench.guest.rescinds) == 4)
    await until(lambda: not bench.guest.partition.vmbus.channels)
    await bench.services.close()


async def test_the_services_come_back_with_the_door(bench: Bench) -> None:
    await bench.opened(bench.heartbeat, stock_utils.HEARTBEAT, "heartbeat")
    partition = bench.guest.partition
    assert partition._link is not None
    partition._link.close("the test cuts the door")
    await until(lambda: not partition.attached)
    await until(lambda: bench.services.heartbeat_state is HeartbeatState.UNKNOWN)
    bench.guest.offers.clear()
    assert await bench.guest.attach()
    await until(lambda: len(bench.guest.offers) == 4)
    again = HeartbeatDriver(bench.guest)
    await bench.opened(again, stock_utils.HEARTBEAT, "heartbeat")
    assert [entry.state for entry in partition.vmbus.channels].count(ChannelState.OPEN) == 1
