"""The demo's claims, each tried on the running lab. A check returns what it saw, or raises CheckFailed."""

from __future__ import annotations

import asyncio
import collections
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from vswitchctl import names
from vswitchlab import lifecycle, packets, processes
from vswitchlab.demo.stage import CheckFailed, Stage, expect
from vswitchlab.progress import Silent
from vswitchlab.shipped import example
from vswitchlab.topology import Guest

__all__ = ["DURING_CAPTURE", "FINAL", "STORY"]

TELNET, OTHER, BULK = 23, 8023, 5001
PINGS = 20
BULK_BYTES = 64 << 20
EXTENSION = "block_telnet"

# Run in guests. A server that says when it listens and greets whoever comes; a client that tells what it got.
GREETER = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    with peer:
        peer.sendall(b"login:")
"""
CALLER = """
import json, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])) as client:
        print(json.dumps({"got": client.recv(64).decode()}))
except OSError as error:
    print(json.dumps({"got": None, "error": type(error).__name__}))
"""


async def no_shortcut(stage: Stage) -> str:
    """A guest holds its memory, its door, event descriptors and its TAP, and sees no other network."""
    await stage.note_processes()
    held = {name: processes.holdings(pid) for name, pid in stage.agents.items()}
    here = processes.namespace(os.getpid(), "net")
    for name, each in held.items():
        expect(not each.others, f"guest {name} (pid {each.pid}) also holds {', '.join(each.others)}")
        expect(not each.foreign_maps, f"guest {name} also maps {', '.join(each.foreign_maps)}")
        expect(len(each.doors) == 1, f"guest {name} holds {len(each.doors)} doors, not 1")
        expect(len(each.listening) <= 1, f"guest {name} listens on {len(each.listening)} sockets")
        expect(
            bool(each.memory) and each.events > 0,
            f"guest {name} holds no memory or no event fd",
        )
        for other, theirs in held.items():
            if other != name:
                expect(not each.memory & theirs.memory, f"guests {name} and {other} share memory")
                expect(not each.doors & theirs.doors, f"guests {name} and {other} share a door")
        expect(processes.namespace(each.pid, "net") != here, f"guest {name} is in this network namespace")
        links = processes.interfaces(each.pid)
        if stage.tap_expected:
            taps = ", ".join(sorted(each.taps)) or "none"
            expect(each.taps == {"eth0"}, f"guest {name} holds the TAPs {taps}, not just that of eth0")
            expect(links == ["eth0", "lo"], f"guest {name} has the interfaces {', '.join(links)}")
    expect(len(stage.namespaces) == len(held), "guests share a network namespace")
    one = next(iter(held.values()))
    tap = "1 TAP" if one.taps else "no TAP (veth)"
    holds = f"{len(one.memory)} memory, 1 door, {one.events} event fds, {tap}"
    return f"each of {len(held)} guests holds {holds}; no more"


async def ping_both_ways(stage: Stage) -> str:
    """Twenty echo requests each way, at the same time, none lost."""
    results = await asyncio.gather(
        _ping(stage, stage.a, stage.b, PINGS), _ping(stage, stage.b, stage.a, PINGS)
    )
    worst = max(results)
    return f"{PINGS} each way, 0 lost, slowest {worst:.2f} ms"


async def _ping(stage: Stage, source: Guest, target: Guest, count: int) -> float:
    """Pings and gives the slowest round trip in milliseconds."""
    identifier = 0x7600 + len(stage.echoes)
    stage.echoes[identifier] = count
    options = ["--count", str(count), "--interval", "0.05", "--identifier", str(identifier), "--json"]
    result = await stage.run_json(source, ["-m", "netvsc.probe", "ping", stage.address(target), *options])
    expect(
        result["received"] == count,
        f"{source.name} -> {target.name}: {result['received']} of {count} answered",
    )
    return float(result["rtt_ms"]["max"])


async def telnet_blocked(stage: Stage) -> str:
    """With the extension loaded a SYN to port 23 is dropped, with reason and counter; the rest flows."""
    file = example(f"extensions/{EXTENSION}.py")
    switch = stage.lab.switches[0].name
    await stage.client.load_extension(
        switch, EXTENSION, file.read_bytes(), file_name=str(file), on_failure="closed"
    )
    await stage.note_processes()
    before = await _filtered(stage)
    async with (
        stage.listening(stage.b, ["-c", GREETER, str(TELNET)]),
        stage.listening(stage.b, ["-c", GREETER, str(OTHER)]),
    ):
        # Less than the second after which the kernel would repeat the SYN: exactly one is sent.
        telnet = await stage.run_json(stage.a, ["-c", CALLER, stage.address(stage.b), str(TELNET), "0.8"])
        expect(telnet["got"] is None, f"telnet was answered with {telnet['got']!r}")
        expect(telnet["error"] == "TimeoutError", f"telnet failed by {telnet['error']}, not by silence")
        other = await stage.run_json(stage.a, ["-c", CALLER, stage.address(stage.b), str(OTHER), "5"])
        expect(other["got"] == "login:", f"port {OTHER} gave {other}")
    await _ping(stage, stage.a, stage.b, 3)
    drops = await _filtered(stage) - before
    expect(drops == 1, f"port {stage.port(stage.a)} counts {drops} FILTERED drops, not 1")
    return f"the SYN to port {TELNET} is dropped and counted (FILTERED 1); port {OTHER} and ping flow"


async def _filtered(stage: Stage) -> int:
    port = await stage.client.get_port(stage.port(stage.a))
    return sum(drop.packets for drop in port.counters.drops if drop.reason == "FILTERED")


async def capture_matches(stage: Stage) -> str:
    """dpkt reads the capture: exactly this run's echo identifiers, packets at both ports, one drop."""
    sightings = packets.read(bytes(stage.capture))
    ports = {f"{guest.nics[0].port}": guest for guest in (stage.a, stage.b)}
    seen: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for sighting in sightings:
        found = packets.echo(sighting)
        if found:
            seen[found] += 1
            where = names.leaf(sighting.interface)
            expect(where in ports, f"a packet was seen at the unknown port {sighting.interface}")
    identifiers = {identifier for _, identifier, _ in seen}
    expect(
        identifiers == set(stage.echoes),
        f"echo identifiers in the capture {sorted(identifiers)}, sent {sorted(stage.echoes)}",
    )
    for identifier, count in stage.echoes.items():
        for kind in (8, 0):
            sequences = sorted(seq for k, i, seq in seen if (k, i) == (kind, identifier))
            word = "requests" if kind == 8 else "replies"
            expect(len(sequences) == count, f"identifier {identifier}: {len(sequences)} {word}, sent {count}")
    twice = [key for key, number in seen.items() if number != 2]
    expect(not twice, f"{len(twice)} echo packets were not seen exactly once at each port: {twice[:3]}")
    dropped = [sighting for sighting in sightings if sighting.comment]
    said = [each.comment for each in dropped]
    expect(len(dropped) == 1, f"{len(dropped)} drops in the capture, not 1: {said[:3]}")
    expect(
        packets.syn_to(dropped[0]) == TELNET, f"the dropped packet is not the SYN to port {TELNET}: {said[0]}"
    )
    expect("telnet" in said[0], f"the drop's reason does not name the extension's words: {said[0]}")
    stage.dropped_frame, stage.dropped_comment = dropped[0].frame, said[0]
    return (
        f"{len(sightings)} packets: {len(seen)} echoes of {len(identifiers)} identifiers, 1 drop: {said[0]}"
    )


async def trace_agrees(stage: Stage) -> str:
    """Trace says of the captured SYN that it is dropped for that reason, of another that it is delivered."""
    a, b = stage.a.nics[0], stage.b.nics[0]
    other = packets.frame_to(a.mac, b.mac, stage.address(stage.a), stage.address(stage.b), OTHER)
    expect(bool(stage.dropped_frame), "there is no captured SYN to trace (capture_matches failed)")
    blocked, passed = await stage.client.trace(stage.port(stage.a), [stage.dropped_frame, other])
    expect(
        blocked.drop_reason == "FILTERED",
        f"trace says {blocked.drop_reason or 'delivered'} of the dropped SYN",
    )
    said = blocked.drop_detail
    expect("telnet is not" in said, f"trace does not give the extension's words: {said}")
    expect(EXTENSION in said, f"trace does not name the extension: {said}")
    expect(
        "telnet is not" in stage.dropped_comment, f"the capture gives another reason: {stage.dropped_comment}"
    )
    target = names.port(stage.port(stage.b))
    expect(
        list(passed.delivered_to) == [target], f"trace delivers port {OTHER} to {list(passed.delivered_to)}"
    )
    return f"SYN to {TELNET}: FILTERED by {EXTENSION}; SYN to {OTHER}: delivered to {names.short(target)}"


async def telnet_restored(stage: Stage) -> str:
    """With the extension unloaded telnet works, and the extension's process is gone."""
    switch = stage.lab.switches[0].name
    pids = [each.pid for each in await stage.client.list_extensions(switch)]
    await stage.client.unload_extension(f"{switch}/{EXTENSION}")
    left = processes.alive(pids)
    expect(not left, f"the extension's process {left} is still there")
    async with stage.listening(stage.b, ["-c", GREETER, str(TELNET)]):
        result = await stage.run_json(stage.a, ["-c", CALLER, stage.address(stage.b), str(TELNET), "5"])
    expect(result["got"] == "login:", f"telnet gave {result}")
    return f"port {TELNET} answers again, the extension's process is gone"


async def tcp_sha256(stage: Stage) -> str:
    """64 MiB through one TCP connection, the same digest at both ends."""
    bulk = ["-m", "netvsc.probe"]
    options = ["--port", str(BULK), "--json"]
    async with stage.listening(stage.b, [*bulk, "tcp-serve", *options]) as finished:
        started = asyncio.get_running_loop().time()
        sent = await stage.run_json(
            stage.a, [*bulk, "tcp-send", stage.address(stage.b), *options, "--bytes", str(BULK_BYTES)], 120
        )
        seconds = asyncio.get_running_loop().time() - started
        output = await asyncio.wait_for(finished, 20)
    received = json.loads(output.splitlines()[-1])
    expect(received["bytes"] == BULK_BYTES, f"{received['bytes']} of {BULK_BYTES} bytes came")
    expect(sent["sha256"] == received["sha256"], f"sent {sent['sha256']}, received {received['sha256']}")
    rate = BULK_BYTES * 8 / seconds / 1e9
    return f"64 MiB in {seconds:.1f} s ({rate:.2f} Gbit/s), sha256 {received['sha256'][:16]}... at both ends"


async def nothing_left(stage: Stage) -> str:
    """After `lab down` and the daemon's end no process, socket, file or namespace of the run is left."""
    await stage.note_processes()
    lab = await lifecycle.find(stage.client, stage.lab.name)
    await lifecycle.down(stage.client, lab, Silent())
    await stage.client.shutdown(stop_guests=True)
    await stage.client.close()
    await asyncio.to_thread(stage.daemon.process.wait, 15)
    deadline = asyncio.get_running_loop().time() + 3
    while (found := _left(stage)) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - /proc tells nobody
        await asyncio.sleep(0.05)
    if found:
        raise CheckFailed(f"left: {'; '.join(found)}")
    return f"{len(stage.pids)} processes, {len(stage.namespaces)} namespaces, all sockets and files are gone"


def _left(stage: Stage) -> list[str]:
    found = [f"process {pid}" for pid in processes.alive(stage.pids)]
    found += [f"process {pid} names {stage.run_dir}" for pid in processes.mentioning(str(stage.run_dir))]
    found += [
        f"process {pid} in a guest's namespace" for pid in processes.members_of_namespaces(stage.namespaces)
    ]
    found += [
        f"socket {each.path}"
        for each in processes.unix_sockets(os.getpid())
        if str(stage.run_dir) in each.path
    ]
    found += [f"file {path}" for path in sorted(stage.run_dir.rglob("*")) if not _record(path)]
    return found


def _record(path: Path) -> bool:
    """What a daemon keeps for its next start, and for people: it goes with the demo's directory."""
    return path.is_dir() or path.suffix == ".log" or path.name.startswith(("store.db", "daemon.lock"))


Action = Callable[[Stage], Awaitable[str]]
DURING_CAPTURE: tuple[Action, ...] = (ping_both_ways, telnet_blocked)
STORY: tuple[Action, ...] = (capture_matches, trace_agrees, telnet_restored, tcp_sha256)
FINAL: tuple[Action, ...] = (nothing_left,)
