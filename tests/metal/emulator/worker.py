"""The process that kernels run in: a crash or an endless loop in one ends this process, not the tests.

It reads pickled launches from standard input and answers each on standard output. Nothing but the standard library is
imported here.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import sys
from typing import Any, BinaryIO

GUARD = 16384  # bytes between buffers that belong to none
OPS = ("sum", "max", "min", "product", "shuffle", "xor", "down", "up", "broadcast", "ballot", "matrix")
GRID_COUNTERS = (
    "threads", "threadgroups", "simdgroups", "threadgroup_barriers", "simdgroup_barriers", "threadgroup_memory_bytes",
    "threadgroup_loads", "threadgroup_stores",
)  # fmt: skip
BUFFER_COUNTERS = (
    "loads", "load_bytes", "unique_bytes", "neighbour_unique_bytes", "threadgroup_unique_bytes", "stores",
    "store_bytes", "unique_stored_bytes",
)  # fmt: skip


class Buffer(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p), ("inside", ctypes.c_void_p), ("size", ctypes.c_uint64), ("access", ctypes.c_int),
        ("initialised", ctypes.c_int),
    ]  # fmt: skip


class GridStats(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in GRID_COUNTERS), ("ops", ctypes.c_uint64 * len(OPS)),
        ("error", ctypes.c_char * 512),
    ]  # fmt: skip


class BufferStats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in BUFFER_COUNTERS]


class _Memory:
    """Device memory: one mapping with a guard before, between and after the buffers, each aligned to a page."""

    def __init__(self, sizes: list[int]) -> None:
        self.offsets, total = [], GUARD
        for size in sizes:
            self.offsets.append(total)
            total = -(-(total + size + GUARD) // 4096) * 4096
        self._map = mmap.mmap(-1, total)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def address(self, index: int) -> int:
        return self._base + self.offsets[index]


def launch(runtime: ctypes.CDLL, request: dict[str, Any]) -> dict[str, Any]:
    """Run one grid. ``request``: library, buffers (see ``worker_process.Argument``), grid, threadgroup, flags."""
    arguments = request["arguments"]
    count = len(arguments)
    memory = _Memory([a["size"] for a in arguments])
    masks = [ctypes.create_string_buffer(a["inside"] or b"") for a in arguments]
    buffers, buffer_stats = (Buffer * count)(), (BufferStats * count)()
    pointers = (ctypes.c_uint64 * (max(a["index"] for a in arguments) + 1))()
    for i, a in enumerate(arguments):
        address = memory.address(i)
        pointers[a["index"]] = address
        initialised = a["data"] is not None
        inside = None if a["inside"] is None else ctypes.addressof(masks[i])
        buffers[i] = Buffer(address, inside, a["size"], a["access"], initialised)
        if initialised:
            ctypes.memmove(address, a["data"], a["size"])
        else:
            ctypes.memset(address, 0xFF, a["size"])
    function = ctypes.cast(ctypes.CDLL(request["library"]).emu_entry, ctypes.c_void_p)
    stats = GridStats()
    failed = runtime.emu_launch(
        function, pointers, (ctypes.c_uint32 * 3)(*request["grid"]), (ctypes.c_uint32 * 3)(*request["threadgroup"]),
        buffers, buffer_stats, count, ctypes.byref(stats), request["flags"],
    )  # fmt: skip
    runtime.emu_block_counts.restype = ctypes.POINTER(ctypes.c_uint64)
    counts = runtime.emu_block_counts()
    if failed:
        return {"error": stats.error.decode()}
    return {
        "error": "",
        "outputs": [ctypes.string_at(memory.address(i), a["size"]) for i, a in enumerate(arguments) if a["access"]],
        "grid": {name: getattr(stats, name) for name in GRID_COUNTERS},
        "ops": {name: stats.ops[i] for i, name in enumerate(OPS) if stats.ops[i]},
        "executed": list(counts[: request["blocks"]]),
        "buffers": [{name: getattr(b, name) for name in BUFFER_COUNTERS} for b in buffer_stats],
    }  # fmt: skip


def main(runtime_path: str, requests: BinaryIO, replies: BinaryIO) -> None:
    runtime = ctypes.CDLL(runtime_path, mode=ctypes.RTLD_GLOBAL)
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(launch(runtime, request), replies)
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
