"""The extensible switch: switches, ports, extensions, capture and trace, in-process or under the daemon."""
