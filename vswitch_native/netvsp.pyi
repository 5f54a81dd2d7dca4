"""Typed surface of the native `netvsp` submodule."""
