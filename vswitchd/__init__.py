"""The vswitch daemon: serves `vswitch.v1`, and composes hypervisor, switches, synthetic NICs and guests."""
