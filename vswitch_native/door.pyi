"""Typed surface of the native `door` submodule."""
