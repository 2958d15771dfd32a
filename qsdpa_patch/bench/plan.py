"""From the options of the command to the cases that it runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.bench.cases import Case
from qsdpa_patch.kernels.format import FLOAT_FORMATS, Format

__all__ = ["SUITES", "formats", "plan_cases"]

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Suite:
    """Defaults of a suite. The CPU gets less to do, or one run of all suites would take an hour.

    cpu_calls, gpu_calls: per timed run. Steps of a model, and calls of its layers, come in runs on the CPU too, as in a
        text: Python builds the next one while MLX computes, and no core falls asleep. On a GPU five times the calls of
        a step of 32 layers (``SUBMITTED_TOGETHER``).
    """

    heads: int
    kv_heads: int
    head_dim: int
    cpu_contexts: tuple[int, ...]
    gpu_contexts: tuple[int, ...]
    cpu_query_length: int = 1
    gpu_query_length: int = 1
    rope_dim: int = 0
    cpu_calls: int = 1
    gpu_calls: int = 160


SUITES = {
    "decode": Suite(32, 8, 128, (1024, 4096, 16384), (1024, 8192, 32768, 131072), cpu_calls=8),
    "prefill": Suite(32, 8, 128, (1024, 2048), (8192, 32768), 64, 2048, gpu_calls=2),
    "mla": Suite(32, 1, 512, (1024, 4096), (1024, 8192, 32768), rope_dim=64, cpu_calls=8),
    "append": Suite(32, 8, 128, (4096,), (8192, 131072)),
    "e2e": Suite(16, 4, 64, (1024, 4096), (8192, 32768), cpu_calls=8, gpu_calls=64),
}


def plan_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that ``args`` ask for, suite by suite, shape by shape, contexts in the order given.

    Raises:
        ValueError: for options that do not go together.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    dtype = DTYPES[args.dtype] if args.dtype else (mx.float32 if on_cpu else mx.float16)
    for name in dict.fromkeys(args.suite):
        suite = SUITES[name]
        key_dim = args.head_dim or suite.head_dim
        heads, kv_heads = args.heads or suite.heads, 1 if suite.rope_dim else args.kv_heads or suite.kv_heads
        if heads % kv_heads:
            raise ValueError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
        query_length = args.query_length or (suite.cpu_query_length if on_cpu else suite.gpu_query_length)
        if name == "e2e" and (args.batch, query_length, args.value_dim) != (1, 1, None):
            raise ValueError("e2e decodes single tokens of one sequence: no --batch, --query-length, --value-dim")
        if suite.rope_dim and query_length > 1:
            raise ValueError(f"--query-length {query_length}: models absorb only single tokens in {name}")
        contexts = args.context or (suite.cpu_contexts if on_cpu else suite.gpu_contexts)
        for key_format, value_format in formats(args):
            for context in contexts:
                if context < query_length:
                    raise ValueError(f"--context {context} is less than the query length {query_length}")
                yield Case(
                    suite=name,
                    batch=args.batch,
                    heads=heads,
                    kv_heads=kv_heads,
                    key_dim=key_dim,
                    value_dim=key_dim if suite.rope_dim else args.value_dim or key_dim,
                    query_length=query_length,
                    context=context,
                    dtype=dtype,
                    key_format=key_format.fit(key_dim)[0],
                    value_format=value_format.fit(args.value_dim or key_dim)[0],
                    rope_dim=suite.rope_dim,
                    model=Path(args.model).name if args.model and name == "e2e" else "",
                )


def formats(args: argparse.Namespace) -> list[tuple[Format, Format]]:
    """The formats of keys and values that ``args`` ask for.

    Raises:
        ValueError: for bits, group sizes or names that MLX does not have.
    """
    if bool(args.key_bits) != bool(args.value_bits):
        raise ValueError("--key-bits and --value-bits go together")
    alike = [Format.affine(bits, args.group_size) for bits in args.bits] + [Format.named(n) for n in args.format]
    chosen = [(format, format) for format in alike]
    if args.key_bits:
        chosen.append((_parse(args.key_bits, args.group_size), _parse(args.value_bits, args.group_size)))
    chosen = chosen or [(Format.affine(4, args.group_size),) * 2]
    return [(replace(keys, rotated=args.rotate), replace(values, rotated=args.rotate)) for keys, values in chosen]


def _parse(text: str, group_size: int) -> Format:
    """``"8"`` or ``"mxfp4"`` as a format."""
    if text in FLOAT_FORMATS:
        return Format.named(text)
    if not text.isdigit():
        raise ValueError(f"{text!r} is no number of bits and none of {', '.join(FLOAT_FORMATS)}")
    return Format.affine(int(text), group_size)
