"""What it costs the host to make the graph of one attention call: ours, and mlx-lm's over quantized keys.

    python -m tests.metal.host_cost

MLX without Metal makes such a graph only while it exports a function, and evaluates none of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention_of_mlx_lm
from mlx_lm.models.cache import QuantizedKVCache as QuantizedKVCacheOfMlxLm

from qsdpa_patch.caches import QuantizedKVCache
from qsdpa_patch.kernels.attention_call import check_call
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.metal import backend
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor

__all__ = ["microseconds"]


def microseconds(count: int) -> dict[str, float]:
    """Of one token over ``count`` keys in float16, 4-bit, 32 query heads and 8 key heads of 128 dims."""
    queries, rows = (mx.random.normal((1, h, n, 128)).astype(mx.float16) for h, n in ((32, 1), (8, count)))
    keys, values = QuantizedKVCache(Format.affine(4)).update_and_fetch(rows, rows)
    assert isinstance(keys, QuantizedTensor)
    assert isinstance(values, QuantizedTensor)
    theirs = QuantizedKVCacheOfMlxLm(group_size=64, bits=4).update_and_fetch(rows, rows)
    call = check_call(queries, keys, values, scale=0.1)
    calls: dict[str, Callable[[], object]] = {
        "checking the call": lambda: check_call(queries, keys, values, scale=0.1),
        "the call": lambda: backend.attend(call),
        "mlx-lm's call": lambda: attention_of_mlx_lm(queries, *theirs, scale=0.1, mask=None, group_size=64, bits=4),
    }
    times: dict[str, float] = {}

    def exported(x: mx.array) -> mx.array:
        times.update({name: min(_time(function) for _ in range(20)) for name, function in calls.items()})
        return x + 1

    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(str(Path(folder) / "graph.mlxfn"), exported, mx.zeros(1))
    return times


def _time(function: Callable[[], object], calls: int = 200) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls * 1e6


def main() -> None:
    for count in (500, 8000):
        times = ", ".join(f"{name} {us:.1f}" for name, us in microseconds(count).items())
        print(f"{count} keys, µs: {times}")


if __name__ == "__main__":
    main()
