"""Tries out a freshly built graph library, in a process that may crash: ``python -m … GRAPH_LIBRARY C_LIBRARY``.

Exit status 0 when its results are right; else the last line says what is wrong.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.kernels.attention_call import AttentionCall
from qsdpa_patch.kernels.cpu import plans
from qsdpa_patch.kernels.cpu.graph import attend_lazily, open_graph
from qsdpa_patch.kernels.cpu.self_check import wrong_results


def main(graph: Path, kernels: Path) -> str:
    """What is wrong with the library ``graph``, with the kernel of the library ``kernels``; empty when nothing is."""
    kernel = ctypes.cast(ctypes.CDLL(str(kernels)).qsdpa_attend, ctypes.c_void_p).value or 0
    attend = open_graph(graph)

    def attend_in_graph(call: AttentionCall) -> mx.array:
        return attend_lazily(attend, kernel, call, plans.fill_fields(call, threads=2))

    return wrong_results(attend_in_graph)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])) or 0)
