"""Typed surface of the native `ring` submodule."""
