"""What a short lab file becomes: defaults, addresses, names, and that the full form says the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from vswitchlab import LabFileError, graph, load_file, load_text, resolve
from vswitchlab.resolve import resolve_mapping
from vswitchlab.schema import schema

ROOT = Path(__file__).parents[3]
LABS = sorted((ROOT / "examples" / "labs").glob("*.yaml"))


def test_a_virtual_machine_has_its_files_seen_from_the_lab_file_and_addresses_like_any_guest(
    tmp_path: Path,
) -> None:
    (tmp_path / "boot").mkdir()
    for name in ("vmlinuz", "initrd"):
        (tmp_path / "boot" / name).touch()
    web = {
        "kind": "vm",
        "kernel": "boot/vmlinuz",
        "initrd": "boot/initrd",
        "memory": "1G",
        "cpus": 4,
        "host_cpus": [1],
    }
    lab = resolve_mapping({"guests": {"web": web, "box": {"memory": 64}}}, directory=tmp_path)
    machine = lab.guest("web").machine
    assert machine is not None
    assert (machine.kernel, machine.initrd) == (tmp_path / "boot" / "vmlinuz", tmp_path / "boot" / "initrd")
    assert (machine.cmdline, machine.cpus, machine.host_cpus) == ("console=ttyS0", 4, (1,))
    assert (lab.guest("web").kind, lab.guest("web").memory) == ("vm", 1024)
    assert (lab.guest("box").kind, lab.guest("box").memory) == ("netns", 64)
    assert lab.guest("box").hosts["web"] == ("10.77.0.1", "fd77::1")
    assert resolve_mapping(lab.as_dict(), directory=tmp_path) == replace(lab, file="<lab>")
    assert "web (vm) eth0  10.77.0.1/24" in graph.text(lab)
    assert 'guest_web{{"web<br/>vm"}}' in graph.mermaid(lab)


def test_two_names_are_a_whole_lab() -> None:
    lab = resolve(load_text("guests: [a, b]", file="two.yaml"))
    assert [switch.name for switch in lab.switches] == ["s0"]
    a, b = lab.guests
    assert [str(address) for address in a.nics[0].addresses] == ["10.77.0.1/24", "fd77::1/64"]
    assert [str(address) for address in b.nics[0].addresses] == ["10.77.0.2/24", "fd77::2/64"]
    assert a.hosts == b.hosts == {"a": ("10.77.0.1", "fd77::1"), "b": ("10.77.0.2", "fd77::2")}
    assert (a.nics[0].name, a.nics[0].port, a.nics[0].mtu) == ("eth0", "a-eth0", 1500)
    assert lab.name == "two"


def test_macs_depend_on_names_only_and_differ() -> None:
    one = resolve(load_text("guests: [a, b]", file="two.yaml"))
    two = resolve(load_text("guests: [b, a]", file="two.yaml"))
    macs = {guest.name: guest.nics[0].mac for guest in one.guests}
    assert macs == {guest.name: guest.nics[0].mac for guest in two.guests}
    assert len(set(macs.values())) == 2
    assert all(mac.startswith("00:15:5d:") for mac in macs.values())


def test_automatic_addresses_step_around_given_ones() -> None:
    lab = resolve_mapping(
        {"guests": {"a": None, "b": {"nics": [{"addresses": ["10.77.0.1/24"]}]}, "c": None}}
    )
    assert str(lab.guest("a").nics[0].addresses[0]) == "10.77.0.2/24"
    assert str(lab.guest("c").nics[0].addresses[0]) == "10.77.0.3/24"


def test_a_switch_without_networks_gives_no_addresses() -> None:
    lab = resolve_mapping({"switches": {"s0": {"subnet": None, "subnet6": None}}, "guests": ["a"]})
    assert lab.guest("a").nics[0].addresses == ()
    assert lab.guest("a").hosts == {}


def test_guests_without_nics_key_are_on_every_switch() -> None:
    lab = resolve_mapping({"switches": ["x", "y"], "guests": ["a"]})
    assert [(nic.name, nic.switch, str(nic.addresses[0])) for nic in lab.guest("a").nics] == [
        ("eth0", "x", "10.77.0.1/24"),
        ("eth1", "y", "10.77.1.1/24"),
    ]


def test_names_resolve_to_addresses_on_a_shared_switch() -> None:
    lab = resolve_mapping(
        {"switches": ["x", "y"], "guests": {"a": {"nics": ["x"]}, "b": {"nics": ["y"]}, "r": None}}
    )
    assert lab.guest("a").hosts["r"][0] == "10.77.0.2"
    assert lab.guest("b").hosts["r"][0] == "10.77.1.2"
    assert lab.guest("a").hosts["b"][0] == "10.77.1.1"


def test_yaml_words_that_look_like_other_things_stay_text() -> None:
    lab = resolve(load_text("guests: {no: {nics: [{mac: 12:15:50:01:02:03}]}, on: }"))
    assert [guest.name for guest in lab.guests] == ["no", "on"]
    assert lab.guest("no").nics[0].mac == "12:15:50:01:02:03"


def test_text_commands_go_through_a_shell_and_lists_do_not() -> None:
    lab = resolve_mapping({"guests": {"a": {"commands": ["echo x | cat", ["echo", "|"]]}}})
    assert lab.guest("a").commands == (("sh", "-c", "echo x | cat"), ("echo", "|"))


@pytest.mark.parametrize("file", LABS, ids=lambda file: file.stem)
def test_example_names_its_schema_for_editors_and_holds_to_it(file: Path) -> None:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    target = (file.parent / first.partition("$schema=")[2]).resolve()
    assert json.loads(target.read_text(encoding="utf-8")) == schema()
    assert resolve(load_file(file)).guests


@pytest.mark.parametrize("file", LABS, ids=lambda file: file.stem)
def test_resolving_the_resolved_form_changes_nothing(file: Path, tmp_path: Path) -> None:
    lab = resolve(load_file(file))
    again = tmp_path / file.name
    again.write_text(yaml.safe_dump(lab.as_dict(), sort_keys=False), encoding="utf-8")
    assert resolve(load_file(again)).as_dict() == lab.as_dict()


def test_the_schema_is_a_valid_draft_2020_12_schema_and_says_what_each_key_is() -> None:
    Draft202012Validator.check_schema(schema())
    for part in (schema(), *(each for each in schema()["$defs"].values() if "properties" in each)):
        for key, body in part["properties"].items():
            assert body.get("description") or body.get("title"), key


def test_a_lab_in_python_reports_problems_without_a_file() -> None:
    with pytest.raises(LabFileError, match=r'^<lab>:1:1: guests\.a\.mtu: unknown key "mtu"'):
        resolve_mapping({"guests": {"a": {"mtu": 3}}})
