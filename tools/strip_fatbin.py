#!/usr/bin/env python3
"""Blank the GPU code of all architectures but some in a shared library, so that it compresses to a fraction.

A library built by nvcc holds fat binaries: a header (magic 0xBA55ED50, version, header size, size of all entries) and
entries, one for each architecture, each with its own header (kind, version, header size, payload size, ...,
architecture at byte 28). The payloads of other architectures become zeros; headers and offsets stay, so the driver
finds what is left.

    python tools/strip_fatbin.py libtransformer_engine.so 90 [100 ...]
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<IHHQ")
"""Magic, version, header size, size of the entries."""
ENTRY = struct.Struct("<HHIQ")
"""Kind, version, header size, payload size."""
ARCHITECTURE_OFFSET = 28


def strip(code: bytearray, kept: set[int]) -> dict[int, int]:
    """Blank the payloads of other architectures in place.

    Args:
        code: the library.
        kept: architectures to keep, such as 90.
    Returns:
        Bytes of GPU code found, by architecture.
    """
    found: dict[int, int] = {}
    at = code.find(MAGIC)
    while at >= 0:
        _, version, header, size = HEADER.unpack_from(code, at)
        if (version, header) != (1, HEADER.size):  # the four bytes are something else
            at = code.find(MAGIC, at + 1)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            _, _, entry_header, payload = ENTRY.unpack_from(code, entry)
            if not entry_header:
                break
            (architecture,) = struct.unpack_from("<I", code, entry + ARCHITECTURE_OFFSET)
            found[architecture] = found.get(architecture, 0) + payload
            if architecture not in kept:
                code[entry + entry_header : entry + entry_header + payload] = bytes(payload)
            entry += entry_header + payload
        at = code.find(MAGIC, end)
    return found


def main() -> int:
    """Strip a library and print what it held; exit code 1 when nothing of the kept architectures was there."""
    path, kept = Path(sys.argv[1]), {int(text) for text in sys.argv[2:]}
    code = bytearray(path.read_bytes())
    found = strip(code, kept)
    path.write_bytes(code)
    for architecture, size in sorted(found.items()):
        print(f"sm_{architecture}: {size / 1e6:.1f} MB{'' if architecture in kept else ', blanked'}")
    return 0 if kept & found.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
