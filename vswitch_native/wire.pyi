"""Typed surface of the native `wire` submodule."""
