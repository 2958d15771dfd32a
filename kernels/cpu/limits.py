"""The least time that attention can take on this machine: reading its packed bytes, and its multiply-adds.

Both rates are measured with the kernel's own library and threads, so that a benchmark can say how near it comes.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.cpu.backend import thread_count
from qsdpa_patch.kernels.cpu.library import load_library

__all__ = ["Limits", "Work", "measure_limits", "work_of"]

_PIECE_BYTES = 1 << 20
_RUNS = 32


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes of packed keys and values, and float32 multiply-adds."""

    nbytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Limits:
    """Best measured rates of this machine, on ``threads`` threads.

    read_bandwidth: bytes a second, from memory that no cache holds.
    multiply_add_rate: float32 multiply-adds a second, in registers.
    """

    read_bandwidth: float
    multiply_add_rate: float
    threads: int

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` can take: that of the nearer limit."""
        return max(work.nbytes / self.read_bandwidth, work.multiply_adds / self.multiply_add_rate)

    def nearer(self, work: Work) -> str:
        """Which limit that is: ``"read bandwidth"`` or ``"multiply-adds"``."""
        reading = work.nbytes / self.read_bandwidth > work.multiply_adds / self.multiply_add_rate
        return "read bandwidth" if reading else "multiply-adds"


def work_of(signature: Signature, key_count: int) -> Work:
    """What attention of ``signature`` over ``key_count`` keys has to read and to compute.

    Every row counts in full, but for a causal mask, where only what is seen counts.
    """
    sig = signature
    pairs = sig.query_length * key_count
    if sig.mask == "causal":
        pairs -= sig.query_length * (sig.query_length - 1) // 2
    key_bytes = sig.key_format.row_bytes(sig.key_dim, sig.key_scale_dtype.size)
    value_bytes = 0 if sig.shared_kv else sig.value_format.row_bytes(sig.value_dim, sig.value_scale_dtype.size)
    row_bytes = sig.kv_heads * (key_bytes + value_bytes) + sig.rope_dim * sig.dtype.size
    row_products = sig.key_dim + sig.rope_dim + sig.value_dim
    return Work(sig.batch * key_count * row_bytes, sig.batch * sig.query_heads * pairs * row_products)


def measure_limits(nbytes: int = 256 << 20, multiply_adds: int = 200_000_000) -> Limits:
    """Measure this machine: the best of many short runs, so that a moment's rest on a busy machine is enough.

    Args:
        nbytes: of the buffer that is read, a quarter of it in each run; more than the caches hold.
        multiply_adds: of a run.

    Takes about half a second.

    Raises:
        CompilerError: there is no compiled library.
    """
    functions, threads = load_library().functions, thread_count()
    memory = ctypes.create_string_buffer(nbytes)
    ctypes.memset(memory, 1, nbytes)  # pages that were never written are all the same one
    pieces = nbytes // _PIECE_BYTES // 4
    bandwidth = rate = 0.0
    for run in range(_RUNS):
        part = ctypes.byref(memory, run % 4 * pieces * _PIECE_BYTES)
        start = time.perf_counter()
        functions.qsdpa_read(part, pieces, threads)
        bandwidth = max(bandwidth, pieces * _PIECE_BYTES / (time.perf_counter() - start))
        start = time.perf_counter()
        done = functions.qsdpa_multiply_add(multiply_adds, threads)
        rate = max(rate, done / (time.perf_counter() - start))
    return Limits(bandwidth, rate, threads)
