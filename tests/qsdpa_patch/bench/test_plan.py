"""Options into cases."""

from __future__ import annotations

import argparse

import mlx.core as mx
import pytest

from qsdpa_patch.bench.cases import Case
from qsdpa_patch.bench.command import add_arguments
from qsdpa_patch.bench.plan import SUITES, plan_cases
from qsdpa_patch.kernels.format import Format


def plan(*options: str) -> list[Case]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return list(plan_cases(parser.parse_args(options)))


def test_every_suite_has_defaults() -> None:
    cases = plan("--suite", *SUITES)
    assert {case.suite for case in cases} == set(SUITES)
    assert all(case.key_format == Format.affine(4, 64) for case in cases)
    assert all(case.rope_dim == (64 if case.suite == "mla" else 0) for case in cases)
    assert all(case.query_length > 16 for case in cases if case.suite == "prefill")


def test_formats_times_contexts() -> None:
    cases = plan("--bits", "4", "8", "--format", "mxfp4", "--group-size", "32", "--context", "64", "128")
    expected = [Format.affine(4, 32), Format.affine(8, 32), Format.named("mxfp4")]
    assert [(case.key_format, case.context) for case in cases] == [(f, n) for f in expected for n in (64, 128)]
    assert all(case.key_format == case.value_format for case in cases)


def test_keys_and_values_apart() -> None:
    options = ("--key-bits", "8", "--value-bits", "mxfp4", "--context", "64", "--value-dim", "64", "--dtype", "float32")
    (case,) = plan(*options)
    assert (case.key_format, case.value_format) == (Format.affine(8, 64), Format.named("mxfp4"))
    assert (case.key_dim, case.value_dim) == (128, 64)
    assert case.label == "B1 Hq32 Hkv8 D128/64 L1, K 8-bit g64, V mxfp4, float32"


def test_rotated() -> None:
    (case,) = plan("--rotate", "--bits", "8", "--context", "64")
    assert case.key_format == case.value_format == Format.affine(8, 64, rotated=True)


def test_group_size_gives_way_to_the_head_dim() -> None:
    (case,) = plan("--head-dim", "96", "--group-size", "128", "--context", "64")
    assert case.key_format.group_size == 32


def test_dtype() -> None:
    (case,) = plan("--dtype", "bfloat16", "--context", "64")
    assert case.dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "7"), "bits=7"),
        (("--key-bits", "8"), "go together"),
        (("--key-bits", "8", "--value-bits", "fp4"), "'fp4' is no number of bits"),
        (("--heads", "6", "--kv-heads", "4"), "--heads 6 is no multiple of --kv-heads 4"),
        (("--context", "8", "--query-length", "9"), "less than the query length"),
        (("--suite", "e2e", "--batch", "2"), "e2e decodes single tokens of one sequence"),
        (("--suite", "mla", "--query-length", "2"), "single tokens in mla"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*options)


@pytest.mark.parametrize(
    "options", [("--context", "0"), ("--seconds", "-1"), ("--suite", "speed"), ("--group-size", "48")]
)
def test_options_out_of_range(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan(*options)
    assert options[0] in capsys.readouterr().err
