"""A partition's life: lost doors, resumes in this process and in the next, parking, the agent's frames."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypervisor_world import PAGE, EchoDevice, Guest, RawGuest, World, until

from hypervisor import AgentError, DoorLost, PartitionError, PartitionState, Quotas
from netvsc.door import DoorLostError
from vswitch_wire import door as wire
from vswitch_wire import packet
from vswitch_wire.door import ErrorCode
from vswitch_wire.memory import create_region
from vswitch_wire.ring import RingReader, RingWriter


async def opened(world: World, name: str = "a") -> tuple[Guest, EchoDevice]:
    guest = await (await world.guest(name)).boot()
    device = EchoDevice()
    await guest.partition.vmbus.offer(device)
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    return guest, device


async def test_a_dead_guest_is_noticed_its_channels_closed_and_callbacks_called(world: World) -> None:
    guest, device = await opened(world)
    other, _ = await opened(world, "b")
    reasons: list[str] = []
    guest.partition.on_detached.append(reasons.append)
    guest.door.close()
    await until(lambda: bool(reasons))
    assert reasons == ["the guest's side closed the door"]
    assert device.events == ["open 0", "close 0"]
    assert guest.partition.state is PartitionState.DETACHED
    assert other.partition.state is PartitionState.RUNNING
    with pytest.raises(PartitionError, match="its guest has ended"):
        await guest.partition.attach(1)


async def test_after_a_lost_door_the_same_host_resumes_with_the_same_memory(world: World) -> None:
    guest, device = await opened(world)
    (pfn,) = guest.allocator.alloc(1)
    guest.door.memory.write(pfn * 4096, b"still here")
    link = guest.partition._link
    assert link is not None
    interrupts = list(guest.door.interrupts)
    link.close("a test cut it")
    await until(lambda: not guest.door.connected)
    guest.offers.clear()
    assert await guest.attach() is True
    # Rescinded, released, offered again, and it opens.
    await until(lambda: bool(guest.offers))
    assert [entry.instance_id for entry in guest.rescinds] == [device.instance_id]
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert device.events == ["open 0", "close 0", "open 0"]
    assert guest.partition.memory.read(pfn * 4096, 10) == b"still here"
    assert len(interrupts) == len(guest.door.interrupts)


async def test_a_door_that_has_just_broken_is_attached_anew_at_once(world: World) -> None:
    guest, device = await opened(world)
    link = guest.partition._link
    assert link is not None
    # The guest may know it, and the caller through the guest, before the partition is told: attach() runs
    # before door_closed(), which the loop calls later.
    attaching = asyncio.create_task(guest.partition.attach(5))
    link.close("a test cut it")
    assert guest.partition.state is PartitionState.RUNNING
    await until(lambda: not guest.door.connected)
    guest.offers.clear()
    _, resumed = await asyncio.gather(attaching, guest.door.accept())
    assert resumed is True
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert device.events == ["open 0", "close 0", "open 0"]


async def restart(world: World, guest: Guest, directory: Path) -> tuple[World, Guest]:
    """A second host takes the partition over from what the first one, as good as killed, saved."""
    saved = json.loads(json.dumps(guest.partition.save()))
    link = guest.partition._link
    assert link is not None
    link.close("the daemon died")
    await until(lambda: not guest.door.connected)
    second = World(directory, engine=world.host.engine)
    partition = second.host.restore(saved)
    guest.partition = partition
    return second, guest


async def test_a_restarted_host_takes_a_partition_back(world: World, tmp_path: Path) -> None:
    guest, device = await opened(world)
    (pfn,) = guest.allocator.alloc(1)
    guest.door.memory.write(pfn * 4096, b"written before")
    second, guest = await restart(world, guest, world.host.run_dir)
    with pytest.raises(PartitionError, match="comes back with attach"):
        _ = guest.partition.memory
    again = EchoDevice(device.instance_id)
    await guest.partition.vmbus.offer(again)
    guest.offers.clear()
    assert await guest.attach() is True
    assert guest.partition.memory.read(pfn * 4096, 14) == b"written before"
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    assert again.events == ["open 0"]
    assert guest.partition.synic.guest_os_id != 0
    assert await guest.door.read_msr(0, 0x40000020) > 0
    await second.close()


async def test_what_no_host_completed_fails_before_its_channel_is_taken_away(world: World) -> None:
    """A driver waits for that without a limit when its device goes: Linux's netvsc_device_idle."""
    guest, device = await opened(world)
    channel = guest.vmbus.channels[guest.offers[0].relid]
    split, pages = channel.downstream_page_offset, channel.ring_pfns
    # The device reads no more, as if the host were killed before it did.
    asyncio.get_running_loop().remove_reader(device.channels[channel.offer.relid].doorbell_fd)
    writer = RingWriter(channel.memory.view(pages[:split], 0, split * PAGE))
    for number in range(5):
        writer.write(packet.encode_inband(b"never read", 40 + number, number != 3))
    writer.commit()
    reader = RingReader(channel.memory.view(pages[split:], 0, (len(pages) - split) * PAGE))
    seen: list[tuple[int, bytes]] = []

    def interrupted() -> None:
        for raw in reader.read():
            decoded = packet.decode(raw)
            assert decoded.type == packet.VM_PKT_COMP
            assert not guest.rescinds
            seen.append((decoded.transaction_id, decoded.payload.rstrip(b"\0")))

    channel.on_interrupt = interrupted
    second, guest = await restart(world, guest, world.host.run_dir)
    again = EchoDevice(device.instance_id)
    again.abandoned = lambda payload: payload[:5]  # type: ignore[attr-defined]
    await guest.partition.vmbus.offer(again)
    await guest.attach()
    await until(lambda: bool(guest.rescinds))
    assert seen == [(40, b"never"), (41, b"never"), (42, b"never"), (44, b"never")]
    await second.close()


async def test_a_ring_that_lies_costs_a_returning_host_nothing(world: World) -> None:
    guest, device = await opened(world)
    channel = guest.vmbus.channels[guest.offers[0].relid]
    asyncio.get_running_loop().remove_reader(device.channels[channel.offer.relid].doorbell_fd)
    channel.memory.store_u32(channel.ring_pfns[0] * PAGE, 4097)
    second, guest = await restart(world, guest, world.host.run_dir)
    await guest.partition.vmbus.offer(EchoDevice(device.instance_id))
    guest.offers.clear()
    await guest.attach()
    await until(lambda: bool(guest.offers))
    assert "cannot be completed" in guest.partition.vmbus.last_error
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    await second.close()


async def test_a_device_that_does_not_come_back_is_rescinded_for_good(world: World, tmp_path: Path) -> None:
    guest, _ = await opened(world)
    second, guest = await restart(world, guest, world.host.run_dir)
    guest.offers.clear()
    await guest.attach()
    await until(lambda: bool(guest.rescinds))
    await until(lambda: not guest.partition.vmbus.channels)
    assert guest.offers == []
    await second.close()


async def test_a_guest_asks_to_start_over_when_the_host_forgot_its_offers(
    world: World, tmp_path: Path
) -> None:
    guest, device = await opened(world)
    saved = guest.partition.save()
    saved["vmbus"]["offered"] = []
    saved["vmbus"]["connection"] = None
    link = guest.partition._link
    assert link is not None
    link.close("the daemon died")
    await until(lambda: not guest.door.connected)
    second = World(world.host.run_dir, engine=world.host.engine)
    guest.partition = second.host.restore(saved)
    await guest.partition.vmbus.offer(EchoDevice(device.instance_id))
    guest.offers.clear()
    await guest.attach()
    await until(lambda: bool(guest.offers))
    await guest.vmbus.open(guest.offers[0], ring_pages=2)
    await second.close()


async def resume_with(world: World, fds: list[int]) -> tuple[wire.DoorError, str]:
    """A partition whose guest answers the resume with these descriptors; ERROR and what attach() says."""
    partition = next(iter(world.host.partitions.values()))
    guest = await RawGuest(partition).attach()
    assert partition._link is not None
    partition._link.close("cut")
    await until(lambda: partition.state is PartitionState.DETACHED)
    given = fds or [guest.fds[0]]
    attaching = asyncio.ensure_future(partition.attach(5))
    await guest.accept()
    guest.send_bytes(wire.pack(wire.HelloAck(flags=wire.HelloFlags.RESUME), guest.hello_sequence), given)
    error = await guest.error()
    with pytest.raises(PartitionError) as raised:
        await attaching
    guest.close()
    return error, str(raised.value)


async def test_a_resume_with_other_memory_is_refused(world: World) -> None:
    await world.host.create_partition("a", memory_bytes=1 << 20)
    fake = create_region("fake", 1 << 20)
    error, text = await resume_with(world, [fake])
    assert error.code == ErrorCode.RESUME
    assert "another file came back" in text
    os.close(fake)


async def test_a_resume_with_too_few_regions_is_refused(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = await RawGuest(partition).attach()
    assert partition._link is not None
    partition._link.close("cut")
    await until(lambda: partition.state is PartitionState.DETACHED)
    attaching = asyncio.ensure_future(partition.attach(5))
    await guest.accept()
    guest.send(wire.HelloAck(flags=wire.HelloFlags.RESUME), guest.hello_sequence)
    assert (await guest.error()).code == ErrorCode.RESUME
    with pytest.raises(PartitionError, match="0 region descriptors came back"):
        await attaching
    guest.close()


async def test_a_fresh_answer_to_a_resume_is_refused(world: World) -> None:
    partition = await world.host.create_partition("a", memory_bytes=1 << 20)
    guest = await RawGuest(partition).attach()
    assert partition._link is not None
    partition._link.close("cut")
    await until(lambda: partition.state is PartitionState.DETACHED)
    attaching = asyncio.ensure_future(partition.attach(5))
    await guest.accept()
    guest.send(wire.HelloAck(), guest.hello_sequence)
    assert (await guest.error()).code == ErrorCode.RESUME
    with pytest.raises(PartitionError, match="disagree on resume"):
        await attaching
    guest.close()


async def test_a_guest_that_lost_its_memory_refuses_the_resume(world: World) -> None:
    guest = await (await world.guest()).boot()
    assert guest.partition._link is not None
    guest.partition._link.close("cut")
    await until(lambda: not guest.door.connected)
    guest.door._memory = None
    accepting = asyncio.ensure_future(guest.door.accept())
    with pytest.raises(PartitionError, match="reported error 5"):
        await guest.partition.attach(5)
    accepting.cancel()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "version 2"),
        ({"attached_before": False}, "never attached"),
        ({"parent": 99}, "parent 99 first"),
    ],
)
async def test_a_saved_partition_that_cannot_be_restored_says_why(
    world: World, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    guest = await (await world.guest()).boot()
    saved = guest.partition.save() | change
    second = World(tmp_path / "second")
    with pytest.raises(ValueError, match=text):
        second.host.restore(saved)
    await second.close()


async def test_save_changes_are_announced(world: World) -> None:
    guest = await (await world.guest()).boot()
    changes: list[int] = []
    guest.partition.on_changed.append(lambda: changes.append(len(guest.partition.save()["vmbus"]["offered"])))
    offer = await guest.partition.vmbus.offer(EchoDevice())
    assert changes[-1] == 1
    await guest.partition.vmbus.rescind(offer)
    await until(lambda: not guest.partition.vmbus.channels)
    assert changes[-1] == 0


async def test_park_stops_and_resume_goes_on(world: World) -> None:
    guest = await (await world.guest()).boot()
    stopped: list[str] = []

    async def stop() -> None:
        stopped.append("stopped")

    guest.door.on_park.append(stop)
    guest.door.on_resume.append(lambda: stopped.append("running"))
    await guest.partition.park()
    assert guest.partition.state is PartitionState.PARKED
    await guest.partition.vmbus.offer(EchoDevice())
    await asyncio.sleep(0.01)
    assert guest.offers == []
    guest.partition.resume()
    await until(lambda: bool(guest.offers))
    assert stopped == ["stopped", "running"]


async def test_the_agents_answers_reach_who_asked(world: World) -> None:
    guest = await (await world.guest()).boot()
    door = guest.door
    seen: list[Any] = []

    def execute(sequence: int, message: wire.Exec, fds: list[int]) -> None:
        seen.append((message.argv, message.env, message.cwd, message.tty, len(fds)))
        os.write(fds[1], b"output")
        for fd in fds:
            os.close(fd)
        door.send(wire.ExecStarted(0, 42), sequence)
        seen.append(sequence)

    def kill(sequence: int, message: wire.Kill, fds: list[int]) -> None:
        door.send(wire.ExecExit(message.signal, "killed"), message.exec_sequence)

    def configure(sequence: int, message: wire.Configure, fds: list[int]) -> None:
        seen.append(message.document)
        door.send(wire.Configured(0 if "hostname" in message.document else 22, "no host name"), sequence)

    door.handlers = {
        wire.FrameType.EXEC: execute,
        wire.FrameType.KILL: kill,
        wire.FrameType.CONFIGURE: configure,
    }
    reader, writer = os.pipe()
    process = await guest.partition.exec(["ls", "-l"], {"A": "B"}, 0, writer, writer, cwd="/")
    os.close(writer)
    assert os.read(reader, 16) == b"output"
    os.close(reader)
    assert seen[0] == (("ls", "-l"), {"A": "B"}, "/", False, 3)
    assert process.pid == 42
    process.kill(9)
    assert await process.wait() == (9, "killed")
    await guest.partition.configure({"hostname": "a"})
    with pytest.raises(AgentError, match="no host name"):
        await guest.partition.configure({})


async def test_a_guest_without_an_agent_says_so(world: World) -> None:
    guest = await (await world.guest()).boot()
    with pytest.raises(AgentError, match="no agent"):
        await guest.partition.configure({"hostname": "a"})
    with pytest.raises(AgentError, match="no agent"):
        await guest.partition.exec(["true"], {}, 0, 1, 2)
    await guest.partition.shutdown()
    assert not guest.door.connected


async def test_a_lost_door_fails_what_waits_on_both_sides(world: World) -> None:
    guest = await (await world.guest()).boot()
    guest.door.handlers = {
        wire.FrameType.EXEC: lambda sequence, message, fds: guest.door.send(wire.ExecStarted(0, 1), sequence),
        wire.FrameType.CONFIGURE: lambda sequence, message, fds: None,
    }
    process = await guest.partition.exec(["sleep"], {}, 0, 1, 2)
    configuring = asyncio.ensure_future(guest.partition.configure({}))
    await asyncio.sleep(0.01)
    assert guest.partition._link is not None
    asking = asyncio.ensure_future(guest.door.read_msr(0, 0x40000002))
    guest.partition._link.close("cut")
    with pytest.raises(DoorLost):
        await process.wait()
    with pytest.raises(DoorLost):
        await configuring
    with pytest.raises(DoorLostError):
        await asking


async def test_delete_gives_everything_back(world: World) -> None:
    before = len(os.listdir("/proc/self/fd"))
    guest, device = await opened(world)
    path = guest.partition.door_path
    reasons: list[str] = []
    guest.partition.on_detached.append(reasons.append)
    await guest.partition.delete()
    guest.door.close()
    assert device.events == ["open 0", "close 0"]
    assert not path.exists()
    assert reasons == []
    guest.synic.close()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_run_directory_with_a_long_name_has_doors_too(tmp_path: Path) -> None:
    world = World(tmp_path / ("long" * 30))
    guest = await (await world.guest()).boot()
    assert guest.partition.attached
    await world.close()


async def test_names_are_unique_and_sizes_checked(world: World) -> None:
    await world.host.create_partition("a", memory_bytes=4096)
    with pytest.raises(ValueError, match="partition a exists"):
        await world.host.create_partition("a", memory_bytes=4096)
    with pytest.raises(ValueError, match="0 bytes of memory"):
        await world.host.create_partition("b", memory_bytes=0)
    with pytest.raises(ValueError, match="65 virtual processors"):
        await world.host.create_partition("b", memory_bytes=4096, vp_count=65)
    with pytest.raises(ValueError, match="quota gpadls is 0"):
        Quotas(gpadls=0)


async def test_the_host_may_be_deaf_to_a_second_connection(world: World) -> None:
    guest = await (await world.guest()).boot()
    with pytest.raises(PartitionError, match="cannot be attached"):
        await guest.partition.attach(1)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.setblocking(False)
    stranger.connect(str(guest.partition.door_path))
    assert await guest.door.read_msr(0, 0x40000002) == 0
    stranger.close()


async def test_an_agent_that_never_answers_holds_nobody(world: World) -> None:
    guest = await (await world.guest()).boot()
    guest.door.handlers = {wire.FrameType.CONFIGURE: lambda sequence, message, fds: None}
    with pytest.raises(TimeoutError, match="partition a: answer to CONFIGURE"):
        await guest.partition.configure({"hostname": "a"}, timeout=0.05)
    await guest.partition.delete()


async def test_a_command_that_is_cancelled_as_the_door_breaks_is_cancelled(world: World) -> None:
    guest = await (await world.guest()).boot()

    def ignore(sequence: int, message: Any, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    guest.door.handlers = {wire.FrameType.EXEC: ignore}
    starting = asyncio.ensure_future(guest.partition.exec(["sleep"], {}, 0, 1, 2))
    await asyncio.sleep(0.01)
    assert guest.partition._link is not None
    guest.partition._link.close("cut")
    await until(lambda: not guest.partition.attached)
    again = asyncio.ensure_future(guest.partition.exec(["sleep"], {}, 0, 1, 2))
    starting.cancel()
    with pytest.raises((asyncio.CancelledError, DoorLost)):
        await starting
    with pytest.raises(PartitionError):
        await again


async def test_of_two_who_attach_at_once_one_does(world: World) -> None:
    guest, _ = await opened(world)
    assert guest.partition._link is not None
    guest.partition._link.close("cut")
    await until(lambda: not guest.door.connected)
    outcomes = await asyncio.gather(
        guest.partition.attach(5), guest.partition.attach(5), guest.door.accept(), return_exceptions=True
    )
    assert outcomes[2] is True
    assert sorted(isinstance(outcome, PartitionError) for outcome in outcomes[:2]) == [False, True]
    assert guest.partition.state is PartitionState.RUNNING


async def test_a_partition_that_is_being_deleted_is_not_attached_behind_its_back(world: World) -> None:
    guest, device = await opened(world)
    device.gate.clear()
    assert guest.partition._link is not None
    guest.partition._link.close("cut")
    await until(lambda: not guest.door.connected)
    attaching = asyncio.ensure_future(guest.partition.attach(5))
    await asyncio.sleep(0.01)
    deleting = asyncio.ensure_future(guest.partition.delete())
    await asyncio.sleep(0.01)
    device.gate.set()
    with pytest.raises(PartitionError, match="is being deleted"):
        await attaching
    await deleting
    assert guest.partition.state is PartitionState.DELETED
    assert guest.partition._link is None
