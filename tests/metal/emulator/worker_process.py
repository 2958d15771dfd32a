"""Launches kernels in a process of their own (worker.py), and what a launch cost."""

from __future__ import annotations

import atexit
import pickle
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.metal.emulator.compiler import runtime_library
from tests.metal.emulator.errors import MetalError
from tests.metal.emulator.instructions import total

__all__ = ["Argument", "BufferCost", "Cost", "run"]

CHECK_RACES, SHUFFLE_ORDER = 1, 2
READ_ONLY, WRITABLE, ATOMIC = 0, 1, 3
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Argument:
    """One buffer of a launch.

    index: Metal's buffer index. data: its bytes, or ``None`` for uninitialised memory of ``size`` bytes.
    inside: for a strided view, one byte for each of ``data``, nonzero where it belongs to the view.
    """

    index: int
    name: str
    size: int
    data: bytes | None
    access: int = READ_ONLY
    inside: bytes | None = None


@dataclass(frozen=True)
class BufferCost:
    """Accesses to one buffer.

    A unique byte counts once per grid, once per threadgroup, or (neighbours) again only where none of the three
    threadgroups before has read it, however often it is read: four in a row run at the same time and share a cache.
    """

    loads: int
    load_bytes: int
    unique_bytes: int
    neighbour_unique_bytes: int
    threadgroup_unique_bytes: int
    stores: int
    store_bytes: int
    unique_stored_bytes: int


@dataclass(frozen=True)
class Cost:
    """What a launch did, over its whole grid.

    ops: SIMD-group functions, counted once per SIMD-group. instructions: by kind, all threads together, of an emulator
    that counts them; such a one does not trace ``buffers`` and ``threadgroup_loads``.
    """

    kernel: str
    threads: int
    threadgroups: int
    simdgroups: int
    threadgroup_barriers: int
    simdgroup_barriers: int
    threadgroup_memory_bytes: int
    threadgroup_loads: int
    threadgroup_stores: int
    ops: dict[str, int]
    buffers: dict[str, BufferCost]
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def simd_reductions(self) -> int:
        """Reductions and exchanges between lanes (not matrix products)."""
        return sum(count for name, count in self.ops.items() if name != "matrix")


def run(
    kernel: str,
    library: Path,
    arguments: Sequence[Argument],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    flags: int = CHECK_RACES,
    blocks: Sequence[Mapping[str, int]] = (),
) -> tuple[list[bytes], Cost]:
    """Run a grid of threads; the bytes of each writable argument afterwards, in order, and the cost.

    Args:
        blocks: instructions by kind in each basic block of a library that counts them.

    Raises:
        MetalError: what the run time found, or that the kernel crashed or ran for too long.
    """
    request = {
        "library": str(library), "arguments": [vars(a) for a in arguments], "grid": tuple(grid),
        "threadgroup": tuple(threadgroup), "flags": flags,
        "blocks": len(blocks),
    }  # fmt: skip
    worker = _Worker.shared()
    reply = worker.ask(request)
    if reply["error"]:
        worker.stop()  # whatever a kernel that breaks the rules has written to is not for the next one
        names = [a.name for a in arguments]
        raise MetalError(re.sub(r"buffer #(\d+)", lambda m: f"buffer '{names[int(m[1])]}'", reply["error"]))
    costs = {a.name: BufferCost(**counters) for a, counters in zip(arguments, reply["buffers"])}
    for a in arguments:
        unwritten = a.size - costs[a.name].unique_stored_bytes
        if a.access and a.data is None and unwritten and not blocks:
            raise MetalError(f"{unwritten} bytes of output '{a.name}' were never written")
    return reply["outputs"], Cost(
        kernel=kernel, **reply["grid"], ops=reply["ops"], buffers=costs, instructions=total(blocks, reply["executed"])
    )


class _Worker:
    """The worker process, started at the first launch, and again after a crash or a kernel that broke the rules."""

    _instance: _Worker | None = None

    def __init__(self) -> None:
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(runtime_library())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.kill)

    @classmethod
    def shared(cls) -> _Worker:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def stop(self) -> int:
        """End the process; its exit status."""
        _Worker._instance = None
        atexit.unregister(self._process.kill)
        self._process.kill()
        return self._process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump(request, stdin)
            stdin.flush()
            if not select.select([stdout], [], [], TIMEOUT_SECONDS)[0]:
                raise MetalError(f"the kernel ran for more than {TIMEOUT_SECONDS} seconds")
            reply: dict[str, Any] = pickle.load(stdout)
        except (EOFError, BrokenPipeError, MetalError) as error:
            status = self.stop()
            if isinstance(error, MetalError):
                raise
            raise MetalError(f"the kernel crashed the process that ran it (status {status})") from None
        return reply
