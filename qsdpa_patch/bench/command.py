"""The command ``qsdpa bench``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from rich.console import Console

from qsdpa_patch.argument_types import positive
from qsdpa_patch.bench.model_suite import RANDOM_MODELS, random_llama
from qsdpa_patch.bench.plan import DTYPES, SUITES, plan_cases
from qsdpa_patch.bench.plot import PlotError, load_pyplot, write_plot
from qsdpa_patch.bench.results import BenchmarkRun
from qsdpa_patch.bench.runner import BenchmarkOptions, run_cases
from qsdpa_patch.bench.table import print_results
from qsdpa_patch.kernels.backends import CHOICES
from qsdpa_patch.kernels.format import AFFINE_GROUP_SIZES, FLOAT_FORMATS
from qsdpa_patch.output_files import check_writable, json_file, write_json

__all__ = ["add_arguments", "run"]

_FILE_WIDTH = 100
"""Columns, where the output goes to a file or a pipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Time every way to attend over a KV cache, in turns, in one process: qsdpa_patch by\n"
        "the route that it takes, mlx-lm's quantized path, dequantizing into MLX's SDPA, and\n"
        "SDPA over an unquantized cache."
    )
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=["decode"], metavar="SUITE",
        help="decode (the default), prefill, mla (absorbed multi-head latent attention), append (adding a token to a "
        "cache), e2e (steps of a whole model)",
    )  # fmt: skip
    shape = parser.add_argument_group("shape (defaults depend on the suite)")
    shape.add_argument("--context", type=positive, nargs="+", metavar="N", help="keys in the cache, one or more")
    shape.add_argument("--batch", type=positive, default=1, metavar="B", help="default: 1")
    shape.add_argument("--heads", type=positive, metavar="H", help="query heads")
    shape.add_argument("--kv-heads", type=positive, metavar="H", help="key and value heads (mla: always 1)")
    shape.add_argument("--head-dim", type=positive, metavar="D", help="of queries and keys; of the latent in mla")
    shape.add_argument("--value-dim", type=positive, metavar="D", help="of values, by default as keys")
    shape.add_argument("--query-length", type=positive, metavar="L", help="query rows")
    shape.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help=f"e2e: a model as mlx-lm takes it, or {' or '.join(RANDOM_MODELS)}, a model of random 4-bit weights; by "
        "default a small random Llama",
    )
    shape.add_argument("--layers", type=positive, default=4, help="e2e: layers of the random Llama (4)")
    stored = parser.add_argument_group("formats")
    stored.add_argument("--bits", type=int, nargs="+", default=[], help="affine, keys and values alike (4)")
    stored.add_argument("--group-size", type=int, default=64, choices=AFFINE_GROUP_SIZES, help="default: 64")
    stored.add_argument("--format", nargs="+", default=[], choices=FLOAT_FORMATS, help="floating-point formats")
    stored.add_argument("--key-bits", metavar="BITS_OR_FORMAT", help="keys alone; with --value-bits")
    stored.add_argument("--value-bits", metavar="BITS_OR_FORMAT", help="values alone; with --key-bits")
    stored.add_argument("--rotate", action="store_true", help="rotate keys and values before quantization")
    stored.add_argument("--dtype", choices=DTYPES, help="of queries, by default float16 on a GPU, float32 on the CPU")
    timing = parser.add_argument_group("running")
    timing.add_argument("--device", choices=("cpu", "gpu"), help="by default MLX's")
    timing.add_argument("--kernels", choices=CHOICES, default="auto", help="default: %(default)s")
    timing.add_argument("--seconds", type=_seconds, default=1.0, help="of measuring time for each path (1)")
    timing.add_argument(
        "--calls", type=positive, help="per timed run; on the CPU 8, of prefill and append 1; on a GPU up to 160"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        metavar="FILE",
        help="write all samples as JSON, after each case ('-': to standard output, alone, at the end)",
    )
    output.add_argument("--plot", metavar="FILE.png", help="draw the medians; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    try:
        _choose_device(args.device)
        if args.plot:  # what cannot be written fails now rather than when everything is measured
            load_pyplot()
            check_writable("--plot", Path(args.plot))
        file = json_file(args.json)
        cases = list(plan_cases(args))
        model = _load(args.model, args.dtype) if args.model else None
    except (PlotError, ValueError, OSError) as error:
        print(f"qsdpa bench: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["qsdpa", *sys.argv[1:]])
    options = BenchmarkOptions(args.kernels, args.seconds, args.calls, model, args.layers)
    benchmark = run_cases(cases, options, command, lambda run: _write_json(run, file))
    _write_json(benchmark, file)
    if args.plot and benchmark.results:
        write_plot(benchmark, Path(args.plot))
    if args.json == "-":
        print(json.dumps(benchmark.to_dict(), indent=2))
        return 0
    print_results(benchmark, Console(width=None if sys.stdout.isatty() else _FILE_WIDTH))
    return 0


def _write_json(benchmark: BenchmarkRun, path: Path | None) -> None:
    if path:
        write_json(path, benchmark.to_dict())


def _load(name: str, dtype: str | None) -> Any:
    """The model, its floating-point parameters in ``dtype`` if one was asked for (else a random one in bfloat16)."""
    if name in RANDOM_MODELS:
        return random_llama(RANDOM_MODELS[name], DTYPES[dtype or "bfloat16"])
    model, *_ = mlx_lm.load(name)
    if dtype is not None:
        model.set_dtype(DTYPES[dtype])
    return model


def _choose_device(name: str | None) -> None:
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise ValueError("--device gpu: this build of MLX has no GPU")
    if name is not None:
        mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no length of time")
    return value
