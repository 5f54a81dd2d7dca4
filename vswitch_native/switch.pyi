"""Typed surface of the native `switch` submodule."""
