"""What both sides of a partition's door share: the byte formats, the ring and guest memory, in plain Python.

This package is the document of record for the formats; `native/wire`, `native/ring` and `native/memory` are
its fast twins and are compared with it in `tests/property/`.
"""
