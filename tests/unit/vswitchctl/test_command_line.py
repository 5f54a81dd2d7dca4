"""The command line: names, exit statuses, output, and what it costs to start."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

from vswitch_api.v1 import port_pb2, switch_pb2
from vswitchctl import calls, names, session
from vswitchctl.errors import VswitchError
from vswitchctl.launch import ROOT
from vswitchctl.main import main
from vswitchctl.output import Columns, Format, write_list, write_one


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "vswitchctl.main", *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "VSWITCH_RUN_DIR": "/nonexistent",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_without_a_daemon_it_says_how_to_start_one_and_ends_with_3() -> None:
    done = run("switch", "list")
    assert done.returncode == 3
    assert done.stderr == (
        "error: no vswitch daemon answers at /nonexistent/api.sock\n"
        "remedy: start one with `vswitch daemon start`, or name its directory with VSWITCH_RUN_DIR\n"
    )


def test_a_wrong_name_is_a_message_and_status_2_and_no_traceback() -> None:
    done = run("port", "show", "p0")
    assert (done.returncode, done.stderr) == (2, "error: 'p0' is not a name of the form SWITCH/PORT\n")


def test_show_rpc_prints_the_call_before_it_fails() -> None:
    done = run("switch", "create", "s0", "--engine", "python", "--show-rpc")
    first = done.stderr.splitlines()[0]
    method, _, request = first.partition(" ")
    assert method == "vswitch.v1.SwitchService/CreateSwitch"
    assert json.loads(request) == {"switch_id": "s0", "switch": {"engine": "ENGINE_PYTHON"}}


GROUPS = [
    "switch",
    "port",
    "nic",
    "partition",
    "extension",
    "capture",
    "trace",
    "inject",
    "lab",
    "daemon",
    "demo",
    "doctor",
    "watch",
]


@pytest.fixture(scope="module")
def overview() -> str:
    """What `vswitch --help` prints."""
    return run("--help").stdout


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_there_and_says_what_it_is_for(
    group: str, overview: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f" {group} " in overview
    monkeypatch.setattr(sys, "argv", ["vswitch", group, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"Usage: vswitch {group}" in shown
    assert "completion" not in shown


def test_a_missing_file_is_named_in_words() -> None:
    done = run("capture", "show", "/no/such/file.pcapng")
    assert (done.returncode, done.stderr) == (2, "error: /no/such/file.pcapng: No such file or directory\n")


def test_help_imports_neither_grpc_nor_labs() -> None:
    code = (
        "import sys; sys.argv = ['vswitch', '--help']\n"
        "from vswitchctl.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "found = {'grpc', 'vswitchlab', 'google.protobuf', 'yaml', 'scapy'} & set(sys.modules)\n"
        "sys.stderr.write(repr(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == "set()"
    for group in ("switch", "port", "nic", "partition", "extension", "capture", "trace", "lab", "daemon"):
        assert group in done.stdout


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, "DAEMON_UNAVAILABLE", 3),
        (grpc.StatusCode.UNAVAILABLE, "GUEST_DID_NOT_START", 1),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", 4),
        (grpc.StatusCode.FAILED_PRECONDITION, "PORT_IN_USE", 5),
        (grpc.StatusCode.PERMISSION_DENIED, "NO_ROLE", 6),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", 7),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", 8),
        (grpc.StatusCode.INTERNAL, "INTERNAL", 1),
    ],
)
def test_exit_statuses_are_the_documented_ones(code: grpc.StatusCode, reason: str, status: int) -> None:
    assert session.exit_code(VswitchError(code, "words", reason=reason)) == status


def test_short_and_full_names_mean_the_same() -> None:
    assert names.port("s0/p0") == names.port("switches/s0/ports/p0") == "switches/s0/ports/p0"
    assert names.nic("a/eth0") == "partitions/a/nics/eth0"
    assert names.short("partitions/a/nics/eth0") == "a/eth0"


@pytest.mark.parametrize("name", ["p0", "a/b/c", "s0/", "/p0", "partitions/a/nics/eth0"])
def test_a_name_that_is_no_ports_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="SWITCH/PORT"):
        names.port(name)


def test_a_table_has_a_line_per_resource_and_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ports = [port_pb2.Port(name="switches/s0/ports/p0", friendly_name="up\x1b[31mlink")]
    write_list(
        ports,
        {"name": lambda port: names.short(port.name), "text": lambda port: port.friendly_name},
        Format.TABLE,
    )
    assert capsys.readouterr().out == "NAME   TEXT\ns0/p0  up?[31mlink\n"


def test_json_and_yaml_carry_the_protos_field_names(capsys: pytest.CaptureFixture[str]) -> None:
    switch = switch_pb2.Switch(name="switches/s0", port_count=2)
    write_one(switch, {}, Format.JSON)
    assert json.loads(capsys.readouterr().out) == {"name": "switches/s0", "port_count": 2}
    write_one(switch, {}, Format.YAML)
    assert capsys.readouterr().out == "name: switches/s0\nport_count: 2\n"


def test_every_builder_names_a_method_of_the_api_with_its_own_types() -> None:
    built = [
        calls.get_switch("s0"),
        calls.list_switches(),
        calls.create_port("s0/p0"),
        calls.create_nic("a/eth0", port="s0/a"),
        calls.start_partition("a"),
        calls.load_extension("s0", "x", b"source"),
        calls.trace("s0/p0", [bytes(14)]),
        calls.get_info(),
    ]
    for call in built:
        service_name, _, method_name = call.method.partition("/")
        service = call.request.DESCRIPTOR.file.services_by_name[service_name]
        method = service.methods_by_name[method_name]
        assert method.input_type is call.request.DESCRIPTOR
        assert method.output_type is call.response.DESCRIPTOR


def test_what_a_guest_or_an_extension_says_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    session.report("the guest\x1b[2J\x07 said:\ntwo lines", "press\x9b5n")
    assert capsys.readouterr().err == "error: the guest?[2J? said:\ntwo lines\nremedy: press?5n\n"
    columns: Columns = {"nics": lambda _: ["a\x1b", "b\n"], "detail": lambda _: "x\x1b[1m\n"}
    write_one(switch_pb2.Switch(), columns, Format.TABLE)
    assert capsys.readouterr().out == "nics    a?, b?\ndetail  x?[1m?\n"
