"""The command ``qsdpa verify``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from rich.console import Console

import qsdpa_patch
from qsdpa_patch.argument_types import at_least_two, positive
from qsdpa_patch.bench.machine import describe_machine
from qsdpa_patch.demo.fidelity import FUSED_ROWS
from qsdpa_patch.demo.package_file import FetchError
from qsdpa_patch.demo.smollm2 import device_dtype, prepare_model
from qsdpa_patch.demo.texts import passage
from qsdpa_patch.kernels.backends import CHOICES
from qsdpa_patch.kernels.format import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_FORMATS
from qsdpa_patch.output_files import json_file, write_json
from qsdpa_patch.verify.bounds import Bounds, exceeded
from qsdpa_patch.verify.measurement import UNQUANTIZED, Options, Result, verify
from qsdpa_patch.verify.render import print_results

__all__ = ["add_arguments", "run"]

_ROTATIONS: dict[str, bool | str] = {"no": False, "both": True, "keys": "keys", "values": "values"}
_PERPLEXITY_INCREASE = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Compare a model over quantized KV caches with itself over an unquantized one, on a text\n"
        "that is fed to it token by token: perplexity, agreement of the most probable next token,\n"
        "KL divergence of the distributions, memory. Side by side: no quantization, mlx-lm's own\n"
        "quantized cache, that of qsdpa_patch with its fused kernels, and the same with plain ops.\n"
        "The exit status is 1 where a cache of qsdpa_patch is beyond a bound."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a path or hub id, as mlx-lm takes it; by default SmolLM2-135M-Instruct, from the package index",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; by default a passage of some 330 tokens")
    parser.add_argument("--tokens", type=at_least_two, default=2048, metavar="N", help="of the text, at most (2048)")
    parser.add_argument(
        "--chunk", type=positive, default=FUSED_ROWS, metavar="N",
        help="tokens fed at a time (%(default)s, as many as the fused kernels take; more go the way of prompts)",
    )  # fmt: skip
    parser.add_argument("--kv-bits", type=int, default=4, choices=AFFINE_BITS, metavar="BITS", help="default: 4")
    parser.add_argument("--kv-group-size", type=int, default=64, choices=AFFINE_GROUP_SIZES, help="default: 64")
    formats = f"{', '.join(map(str, AFFINE_BITS))}, {', '.join(FLOAT_FORMATS)}; by default as --kv-bits"
    parser.add_argument("--key-bits", type=_bits, metavar="BITS", help=f"of keys: {formats}")
    parser.add_argument("--value-bits", type=_bits, metavar="BITS", help="of values, likewise")
    parser.add_argument(
        "--rotate", nargs="?", choices=_ROTATIONS, const="both", default="no",
        help="rotate keys and values before quantization (no; alone: both)",
    )  # fmt: skip
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--max-perplexity-increase", type=float, default=_PERPLEXITY_INCREASE, metavar="PERCENT",
        help="over the unquantized cache (%(default)g)",
    )  # fmt: skip
    parser.add_argument("--max-mean-kl", type=float, metavar="NATS", help="no bound by default")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="of any position; no bound by default")
    parser.add_argument("--min-agreement", type=float, metavar="PERCENT", help="no bound by default")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON ('-': to standard output, alone)")


def run(args: argparse.Namespace) -> int:
    """Run the comparison; the exit status."""
    options = Options(
        bits=args.kv_bits,
        group_size=args.kv_group_size,
        key_bits=args.key_bits,
        value_bits=args.value_bits,
        rotate=_ROTATIONS[args.rotate],
        kernels=args.kernels,
    )
    bounds = Bounds(args.max_perplexity_increase, args.max_mean_kl, args.max_kl, args.min_agreement)
    qsdpa_patch.disable()  # QSDPA_PATCH=1 may have turned it on, and mlx-lm is to be measured as it is
    try:
        file = json_file(args.json)
        text = passage() if args.text is None else args.text.read_text(encoding="utf-8")
        model, tokenizer = _load(args.model)
        tokens = tokenizer.encode(text)[: args.tokens]
        with Console(stderr=True).status("starting") as spinner:
            results, report = verify(
                model,
                tokens,
                options,
                chunk=args.chunk,
                progress=lambda done: spinner.update(f"{done} of {len(tokens)} tokens"),
            )
    except (FetchError, OSError, ValueError) as error:
        print(f"qsdpa verify: {error}", file=sys.stderr)
        return 2
    failures = exceeded(results, bounds)
    if args.json:
        document = _content(args, options, bounds, results, failures)
        document |= {"tokens": len(tokens), "report": report.to_dict()}
        if file:
            write_json(file, document)
        else:
            print(json.dumps(document, indent=2))
    if args.json != "-":
        _print(args, options, results, str(report), len(tokens))
    for failure in failures:
        print(f"qsdpa verify: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _load(name: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer. On the CPU it computes in float32: 16-bit products are slow there."""
    model, tokenizer, *_ = mlx_lm.load(str(prepare_model() if name is None else name))
    if device_dtype() == mx.float32:
        model.set_dtype(mx.float32)
    return model, tokenizer


def _print(args: argparse.Namespace, options: Options, results: list[Result], report: str, tokens: int) -> None:
    console = Console()
    model = args.model or "SmolLM2-135M-Instruct"
    print_results(results, f"{model}, {_describe(options)}, {tokens} tokens, {args.chunk} at a time", console)
    console.print("\nWhere attention over the caches of qsdpa_patch went:")
    console.print(report, highlight=False, markup=False, soft_wrap=True)


def _describe(options: Options) -> str:
    key, value = (options.bits if own is None else own for own in (options.key_bits, options.value_bits))
    sides = [f"{bits}-bit g{options.group_size}" if isinstance(bits, int) else str(bits) for bits in (key, value)]
    rotated = {False: "", True: ", rotated", "keys": ", keys rotated", "values": ", values rotated"}[options.rotate]
    return (sides[0] if sides[0] == sides[1] else f"K {sides[0]} V {sides[1]}") + rotated


def _content(
    args: argparse.Namespace, options: Options, bounds: Bounds, results: list[Result], failures: list[str]
) -> dict[str, Any]:
    base = next(r.fidelity for r in results if r.name == UNQUANTIZED)
    rows = []
    for result in results:
        row = asdict(result)
        if base is not None and result.fidelity is not None:
            row["perplexity_increase_percent"] = 100 * (result.fidelity.perplexity / base.perplexity - 1)
        rows.append(row)
    return {
        "model": args.model or "SmolLM2-135M-Instruct",
        "machine": describe_machine(),
        "chunk": args.chunk,
        "options": asdict(options),
        "results": rows,
        "bounds": asdict(bounds),
        "beyond": failures,
    }


def _bits(text: str) -> int | str:
    if text in FLOAT_FORMATS:
        return text
    if text.isdigit() and int(text) in AFFINE_BITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, (*AFFINE_BITS, *FLOAT_FORMATS)))}")
