"""Typed surface of the native `netvsc` submodule."""
