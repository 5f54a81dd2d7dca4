"""Every resource through its life against a real daemon, by the client library and by the command line."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import grpc
import pytest
import yaml

from vswitch_api.v1 import common_pb2, port_pb2, watch_pb2
from vswitchctl.errors import VswitchError
from vswitchctl.names import leaf

if TYPE_CHECKING:
    from tests.conftest import RunningDaemon, StartDaemon

PLUGIN = b"""
from vswitch.extension import Filter, Packet, Verdict


class NoTelnet(Filter):
    def ingress(self, packet: Packet) -> Verdict:
        if packet.tcp and packet.tcp.dport == 23:
            return packet.drop("telnet is not allowed")
        return packet.allow()
"""
BROADCAST = bytes.fromhex("ffffffffffff00155d000001") + b"\x08\x00" + bytes(50)


def refused(error: pytest.ExceptionInfo[VswitchError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code, error.value.reason


def test_a_switch_and_its_ports_live_and_die(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    assert client.create_switch("s0", labels={"lab": "x"}).name == "switches/s0"
    with pytest.raises(VswitchError) as error:
        client.create_switch("s0")
    assert refused(error) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")
    client.create_port("s0/p0", friendly_name="uplink")
    made = client.create_ports("s0", ["p1", "p2"])
    assert [port.number for port in made] == [2, 3]
    assert client.update_port("s0/p0", friendly_name="down").friendly_name == "down"
    switch = client.get_switch("s0")
    assert (switch.port_count, dict(switch.labels)) == (3, {"lab": "x"})
    with pytest.raises(VswitchError, match="has 3 ports") as error:
        client.delete_switch("s0")
    assert refused(error) == (grpc.StatusCode.FAILED_PRECONDITION, "SWITCH_NOT_EMPTY")
    client.delete_port("s0/p2")
    assert [leaf(port.name) for port in client.list_ports("s0")] == ["p0", "p1"]
    client.delete_switch("s0", force=True)
    assert client.list_switches() == []
    with pytest.raises(VswitchError, match="switches/s0 does not exist") as error:
        client.get_switch("s0")
    assert refused(error) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


def test_a_batch_makes_all_ports_or_none(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_port("s0/p1")
    with pytest.raises(VswitchError, match="switches/s0/ports/p1 exists"):
        client.create_ports("s0", ["p0", "p1", "p2"])
    with pytest.raises(VswitchError, match="comes twice"):
        client.create_ports("s0", ["p5", "p5"])
    assert [leaf(port.name) for port in client.list_ports("s0")] == ["p1"]


def test_lists_come_in_pages(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_ports("s0", [f"p{number:03}" for number in range(250)])
    sizes: list[str] = []
    client.on_call = lambda method, request: sizes.append(method)
    assert len(client.list_ports("s0")) == 250
    assert sizes == ["vswitch.v1.PortService/ListPorts"] * 3


def test_a_wrong_field_is_named_with_what_to_write(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_partition("a")
    with pytest.raises(VswitchError) as error:
        client.create_nic("a/eth0", port="s0/a", addresses=["10.0.0.1"])
    assert [violation.field for violation in error.value.violations] == ["nic.addresses[0]"]
    assert error.value.remedy == "write it as 10.0.0.1/24"
    assert client.list_nics() == []
    assert client.list_ports() == []


def test_a_nic_brings_its_port_and_takes_it_along(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_partition("a")
    nic = client.create_nic("a/eth0", port="s0/a-eth0", addresses=["10.0.0.1/24"], mtu=1400)
    assert (nic.port, nic.mtu, list(nic.addresses)) == ("switches/s0/ports/a-eth0", 1400, ["10.0.0.1/24"])
    assert nic.mac.startswith("00:15:5d:")
    assert client.get_port("s0/a-eth0").nic == "partitions/a/nics/eth0"
    with pytest.raises(VswitchError, match="is in use by partitions/a/nics/eth0"):
        client.create_nic("a/eth1", port="s0/a-eth0")
    with pytest.raises(VswitchError, match="is in use"):
        client.delete_port("s0/a-eth0")
    assert client.set_nic_link("a/eth0", up=False).link == common_pb2.LINK_STATE_DOWN
    assert (nic.queues, nic.open_queues, nic.receive_scaling) == (1, 0, False)
    client.delete_nic("a/eth0")
    assert client.list_ports() == []
    client.delete_partition("a")
    assert client.list_partitions() == []


def test_a_port_that_was_there_before_its_nic_stays(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_port("s0/p0")
    client.create_partition("a")
    client.create_nic("a/eth0", port="s0/p0")
    client.delete_partition("a")
    assert [port.nic for port in client.list_ports()] == [""]


def test_an_extension_is_loaded_changed_and_unloaded(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    extension = client.load_extension("s0", "no-telnet", PLUGIN, file_name="no_telnet.py")
    assert extension.pid > 0
    assert client.get_switch("s0").extensions == ["switches/s0/extensions/no-telnet"]
    assert client.update_extension("s0/no-telnet", on_failure="closed").on_failure == 2
    client.unload_extension("s0/no-telnet")
    assert client.list_extensions() == []


def test_a_plugin_that_cannot_be_loaded_is_refused_with_its_own_error(shared_daemon: RunningDaemon) -> None:
    shared_daemon.client.create_switch("s0")
    with pytest.raises(VswitchError, match=r"broken\.py") as error:
        shared_daemon.client.load_extension(
            "s0", "broken", b"import nothing_of_this_name\n", file_name="broken.py"
        )
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert shared_daemon.client.list_extensions() == []


def test_injected_frames_are_counted_and_their_drops_have_a_reason(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_port("s0/p0")
    done = client.inject("s0/p0", [BROADCAST] * 300)
    assert (done.frames, done.bytes) == (300, 300 * len(BROADCAST))
    counters = client.get_port("s0/p0").counters
    assert counters.in_packets == 300
    assert sum(drop.packets for drop in counters.drops) == 300
    assert all(drop.reason and drop.code for drop in counters.drops)


def test_a_trace_names_stages_and_changes_nothing(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    client.create_port("s0/p0")
    (traced,) = client.trace("s0/p0", [BROADCAST])
    assert traced.steps[0].stage == "receive"
    assert traced.drop_reason
    assert not traced.delivered_to
    assert client.get_port("s0/p0").counters == port_pb2.PortCounters()


def test_a_watch_gives_the_snapshot_then_what_happens(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    stream = client.watch(["switches/"])
    assert next(stream).change.name == "switches/s0"
    assert next(stream).HasField("synced")
    client.create_port("s0/p0")
    client.delete_port("s0/p0")
    added, removed = next(stream), next(stream)
    assert (added.change.type, added.change.port.name) == (
        watch_pb2.CHANGE_TYPE_ADDED,
        "switches/s0/ports/p0",
    )
    assert removed.change.type == watch_pb2.CHANGE_TYPE_REMOVED
    assert removed.revision > added.revision
    stream.close()  # type: ignore[attr-defined]


def test_a_deadline_ends_a_call(shared_daemon: RunningDaemon) -> None:
    client = shared_daemon.client
    client.create_switch("s0")
    stream = client.channel.unary_stream(
        "/vswitch.v1.WatchService/Watch",
        request_serializer=watch_pb2.WatchRequest.SerializeToString,
        response_deserializer=watch_pb2.WatchResponse.FromString,
    )(watch_pb2.WatchRequest(), timeout=0.3)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as error:
        list(stream)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert time.monotonic() - began < 5


def test_health_and_reflection_answer(shared_daemon: RunningDaemon) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    channel = shared_daemon.client.channel
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service="vswitch.v1.SwitchService"), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    names = {service.name for service in listed.list_services_response.service}
    assert {"vswitch.v1.SwitchService", "vswitch.v1.WatchService", "grpc.health.v1.Health"} <= names


def test_the_command_line_does_the_same(daemon: RunningDaemon, tmp_path: object) -> None:
    cli = daemon.cli
    assert cli("switch", "create", "s0").returncode == 0
    shown = cli("port", "create", "s0/p0", "s0/p1", "-o", "json", "--show-rpc")
    assert [port["name"] for port in json.loads(shown.stdout)] == [
        "switches/s0/ports/p0",
        "switches/s0/ports/p1",
    ]
    assert shown.stderr.startswith('vswitch.v1.PortService/BatchCreatePorts {"parent": "switches/s0"')
    assert yaml.safe_load(cli("switch", "list", "-o", "yaml").stdout)[0]["port_count"] == 2
    assert cli("partition", "create", "a", "--host", "b=10.0.0.2").returncode == 0
    assert "a/eth0" in cli("nic", "create", "a/eth0", "--port", "s0/a", "--address", "10.0.0.1/24").stdout
    assert "down" in cli("nic", "link", "a/eth0", "down").stdout
    assert "up" in cli("nic", "set", "a/eth0", "--link", "up").stdout
    assert "0 of 1" in cli("nic", "show", "a/eth0").stdout
    assert cli("port", "list").stdout.splitlines()[0].split() == [
        "NAME",
        "NUMBER",
        "NIC",
        "IN",
        "OUT",
        "DROPPED",
    ]
    taken = cli("switch", "create", "s0")
    assert (taken.returncode, taken.stderr) == (
        5,
        "error: switches/s0 exists already\nremedy: choose another name, or delete it first\n",
    )
    missing = cli("nic", "show", "a/eth9")
    assert missing.returncode == 4
    assert "partitions/a/nics/eth9 does not exist" in missing.stderr
    wrong = cli("switch", "create", "S0!")
    assert wrong.returncode == 7
    assert "Traceback" not in wrong.stderr
    traced = cli("trace", "s0/p0", "--packet", BROADCAST.hex())
    assert traced.returncode == 0, traced.stderr
    assert "=> dropped:" in traced.stdout
    assert "role        admin" in cli("daemon", "status").stdout
    assert cli("partition", "delete", "a").returncode == 0
    assert cli("switch", "delete", "s0", "--force").returncode == 0
    assert cli("daemon", "stop").returncode == 0
    assert cli("daemon", "status").returncode == 3
    assert daemon.process.process.wait(5) == 0


def test_the_engine_is_chosen_for_the_daemon_and_for_a_switch(daemon_factory: StartDaemon) -> None:
    daemon = daemon_factory(engine="python")
    assert daemon.client.get_info().default_engine == common_pb2.ENGINE_PYTHON
    assert daemon.client.create_switch("s0").engine == common_pb2.ENGINE_PYTHON
    with pytest.raises(VswitchError, match=r"switch\.engine") as error:
        daemon.client.create_switch("s1", engine="native")
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_after_the_end_of_all_resources_nothing_but_logs_is_left(daemon: RunningDaemon) -> None:
    daemon.client.create_switch("s0")
    daemon.client.delete_switch("s0")
    daemon.client.shutdown(stop_guests=True)
    assert daemon.process.process.wait(20) == 0
    left = {path.name for path in daemon.run_dir.iterdir()}
    assert left <= {"daemon.log", "logs"}
