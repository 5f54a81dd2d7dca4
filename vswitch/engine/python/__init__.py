"""The Python engine: complete, readable, and what the native engine is compared with."""

from __future__ import annotations

from vswitch.engine.python.datapath import PythonDatapath

__all__ = ["PythonDatapath"]
