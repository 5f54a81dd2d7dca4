"""Typed surface of the native `memory` submodule."""
