"""A lab as a picture in text: for a terminal, or as mermaid for a page."""

from __future__ import annotations

from vswitchlab.topology import Guest, Lab

__all__ = ["mermaid", "text"]


def text(lab: Lab) -> str:
    """Each switch with what hangs on it; guests on several switches appear under each."""
    lines = [f"lab {lab.name}"]
    for switch in lab.switches:
        networks = ", ".join(str(network) for network in switch.networks)
        lines += ["", f"[{switch.name}]" + (f"  {networks}" if networks else "")]
        rows: list[tuple[str, str]] = [
            (f"extension {extension.name}", extension.on_failure) for extension in switch.extensions
        ]
        rows += [
            (f"{_name(guest)} {nic.name}", " ".join(str(address) for address in nic.addresses))
            for guest in lab.guests
            for nic in guest.nics
            if nic.switch == switch.name
        ]
        width = max((len(left) for left, _ in rows), default=0)
        for index, (left, right) in enumerate(rows):
            corner = "└──" if index == len(rows) - 1 else "├──"
            lines.append(f" {corner} {left:{width}}  {right}".rstrip())
    alone = [_name(guest) for guest in lab.guests if not guest.nics]
    if alone:
        lines += ["", f"without a NIC: {', '.join(alone)}"]
    return "\n".join(lines)


def mermaid(lab: Lab) -> str:
    """A mermaid flowchart: switches as boxes with a double border, guests as rounded ones, virtual
    machines as hexagons.
    """
    lines = ["graph LR"]
    for switch in lab.switches:
        extra = "".join(f"<br/>{extension.name}" for extension in switch.extensions)
        lines.append(f'  switch_{_id(switch.name)}[["{switch.name}{extra}"]]')
    for guest in lab.guests:
        shape = f'{{{{"{guest.name}<br/>vm"}}}}' if guest.machine else f'("{guest.name}")'
        lines.append(f"  guest_{_id(guest.name)}{shape}")
        for nic in guest.nics:
            label = "<br/>".join([nic.name, *(str(address) for address in nic.addresses)])
            lines.append(f'  guest_{_id(guest.name)} ---|"{label}"| switch_{_id(nic.switch)}')
    return "\n".join(lines)


def _name(guest: Guest) -> str:
    return f"{guest.name} (vm)" if guest.machine else guest.name


def _id(name: str) -> str:
    return name.replace("-", "_")
