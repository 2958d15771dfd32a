"""The CPU kernel against attention in double precision, over everything it takes.

Not against the float32 reference: with outlier keys its own error comes to 1e-5, and the kernel's is smaller.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qsdpa_patch.kernels.attention_call import AttentionCall, check_call
from qsdpa_patch.kernels.backends import Declined
from qsdpa_patch.kernels.cpu import backend, library, plans
from qsdpa_patch.kernels.cpu.compiler import Compiler, find_compiler
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize
from tests.attention_cases import (
    TOLERANCES,
    Case,
    build,
    check_queries_that_are_not_finite,
    random_case,
    random_mla_case,
    relative_error,
)
from tests.kernels.double_precision import attend_in_double
from tests.threads import run_in_threads

pytestmark = pytest.mark.skipif(not backend.is_available()[0], reason=backend.is_available()[1])


def check(call: AttentionCall, what: object) -> None:
    assert backend.has_fused_kernel(call.signature) == (True, "")
    out = backend.attend(call)
    assert out.dtype == call.queries.dtype
    assert mx.array_equal(out, backend.attend_evaluated(call)), str(what)
    assert relative_error(out, attend_in_double(call)) <= TOLERANCES[call.queries.dtype], str(what)


@pytest.mark.parametrize("block", range(10))
def test_decode_sweep(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        case = random_case(seed)
        check(build(case), case)


@pytest.mark.parametrize("block", range(4))
def test_prefill_sweep(block: int) -> None:
    for seed in range(1000 + block * 10, 1000 + block * 10 + 10):
        case = random_case(seed, max_length=300)
        check(build(case), case)


@pytest.mark.parametrize("block", range(4))
def test_mla_sweep(block: int) -> None:
    for seed in range(block * 15, block * 15 + 15):
        case = random_mla_case(seed)
        check(build(case), case)


@pytest.mark.parametrize("count", [3000, 4097])
@pytest.mark.parametrize("sinks", [False, True])
def test_keys_split_between_threads(count: int, sinks: bool) -> None:
    case = Case(
        seed=count, kv_heads=1, group=4, count=count, capacity=count + 7, key_dim=128, value_dim=128, sinks=sinks
    )
    call = build(case)
    fields, out = prepared(call, threads=4)
    assert library.load_library().functions.qsdpa_attend(fields, call.scale) == 0
    assert relative_error(out, attend_in_double(call)) <= 1e-5


def test_a_mask_may_hide_whole_tiles() -> None:
    case = Case(seed=3, count=700, capacity=700, length=5)
    call = build(case)
    positions = mx.arange(700)
    for keep in (positions >= 690, positions < 3, (positions > 100) & (positions < 130)):
        masked = replace(call, mask=keep.reshape(1, 1, 1, 700), signature=call.signature._replace(mask="bool"))
        check(masked, "window")


def test_masks_are_read_with_their_strides() -> None:
    case = Case(seed=4, batch=2, kv_heads=2, group=2, count=150, capacity=150, length=7)
    call = build(case)
    full = (2, 4, 7, 150)
    masks = [
        mx.broadcast_to(mx.random.normal((1, 4, 1, 1)), full),
        mx.random.normal((2, 4, 150, 7)).swapaxes(2, 3),
        mx.random.normal((2, 4, 7, 300))[..., ::2],
        mx.random.bernoulli(0.5, (4, 2, 7, 150)).swapaxes(0, 1),
        mx.random.normal((1, 1, 7, 1)).astype(mx.float16),
    ]
    for mask in masks:
        kind = "bool" if mask.dtype == mx.bool_ else "additive"
        check(replace(call, mask=mask, signature=call.signature._replace(mask=kind)), mask.shape)


def test_queries_may_be_transposed_and_lazy() -> None:
    call = build(Case(seed=5, kv_heads=2, group=3, count=90, capacity=99, length=4, dtype=mx.bfloat16))
    lazy = (mx.random.normal((1, 4, 6, 64)) * 2).astype(mx.bfloat16).swapaxes(1, 2)
    check(replace(call, queries=lazy), "lazy")


def test_scales_may_differ_from_the_queries_in_dtype() -> None:
    call = build(Case(seed=6, count=130, capacity=150, dtype=mx.float32))
    for dtype in (mx.float16, mx.bfloat16):

        def cast(tensor: QuantizedTensor, dtype: mx.Dtype = dtype) -> QuantizedTensor:
            assert tensor.biases is not None
            scales, biases = tensor.scales.astype(dtype), tensor.biases.astype(dtype)
            return QuantizedTensor(tensor.codes, scales, biases, tensor.format)

        mixed = check_call(call.queries, cast(call.keys), cast(call.values), scale=0.2)
        assert mixed.signature.key_scale_dtype == dtype
        check(mixed, dtype)


def test_scattered_rows_are_declined_when_inputs_are_evaluated() -> None:
    call = build(Case(seed=7))
    queries = mx.random.normal((1, 2, 64, 1)).swapaxes(2, 3)
    assert backend.attend_evaluated(replace(call, queries=queries)).shape == (1, 2, 1, 64)  # contiguous all the same
    scattered = mx.random.normal((1, 2, 64, 2)).swapaxes(2, 3)[:, :, :1]
    with pytest.raises(Declined, match="not contiguous"):
        backend.attend_evaluated(replace(call, queries=scattered))


def test_dims_out_of_range_are_refused_with_the_reason() -> None:
    signature = build(Case(seed=8)).signature._replace(value_dim=544)
    taken, reason = backend.has_fused_kernel(signature)
    assert not taken
    assert "value rows of 544" in reason


Attend = Callable[[AttentionCall], mx.array]


@pytest.fixture(params=["attend", "attend_evaluated"])
def attend_now_or_later(request: pytest.FixtureRequest) -> Attend:
    attend: Attend = getattr(backend, request.param)
    return attend


@pytest.mark.parametrize("transform", ["compile", "vmap", "grad", "jvp"])
def test_traced_arrays_are_declined(transform: str, attend_now_or_later: Attend) -> None:
    call = build(Case(seed=9, count=40, capacity=40))
    reasons = []

    def attend(queries: mx.array) -> mx.array:
        queries = queries.reshape(call.queries.shape)
        try:
            return attend_now_or_later(replace(call, queries=queries)).sum()
        except Declined as declined:
            reasons.append(str(declined))
            return queries.sum()

    run: dict[str, Callable[[], object]] = {
        "compile": lambda: mx.compile(attend)(call.queries),
        "vmap": lambda: mx.vmap(attend)(call.queries),
        "grad": lambda: mx.grad(attend)(call.queries),
        "jvp": lambda: mx.jvp(attend, [call.queries], [call.queries]),
    }
    run[transform]()
    assert len(reasons) == 1
    assert "mx.grad" in reasons[0]


def test_traced_arrays_that_are_evaluated_are_declined(attend_now_or_later: Attend) -> None:
    call = build(Case(seed=9, count=40, capacity=40))

    def attend(queries: mx.array) -> mx.array:
        mx.eval(queries)
        with pytest.raises(Declined, match=r"mx\.grad"):
            attend_now_or_later(replace(call, queries=queries))
        return queries.sum()

    mx.grad(attend)(call.queries)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(seed=9, group=4, count=4000, capacity=4096, mask="additive"),
        Case(seed=9, group=4, length=40, count=200, capacity=256, mask="causal", sinks=True),
        Case(seed=9, kv_heads=1, group=16, count=200, capacity=256, key_dim=256, value_dim=256, rope_dim=64),
    ],
    ids=["one position", "a prompt", "absorbed MLA"],
)
def test_queries_that_are_not_finite(case: Case, bits: int, dtype: mx.Dtype) -> None:
    format = Format.affine(bits, 64)
    call = build(replace(case, key_format=format, value_format=format, dtype=dtype))
    check_queries_that_are_not_finite(backend.attend, call)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_values_of_very_different_sizes(dtype: mx.Dtype) -> None:
    """Most of the weight is on a key with tiny values, as attention sinks have, and the output comes from the others;
    in another head it lies on a group that is much larger than the rest of the row."""
    mx.random.seed(12)
    count, heads, dim = 200, 2, 128
    queries, keys = mx.random.normal((1, heads, 1, dim)), mx.random.normal((1, heads, count, dim))
    keys[:, :, 3] = queries[:, :, 0]
    values = mx.random.normal((1, heads, count, dim))
    values[:, 0, 3] *= 1e-3
    values[:, 1, :, 64:] *= 1e3
    format = Format.affine(4, 64)
    call = check_call(
        queries.astype(dtype), quantize(keys.astype(dtype), format), quantize(values.astype(dtype), format), scale=0.1
    )
    out, wanted = backend.attend(call), attend_in_double(call)
    for head, half in ((0, slice(0, 128)), (1, slice(0, 64)), (1, slice(64, 128))):
        assert relative_error(out[:, head, :, half], wanted[:, head, :, half]) <= TOLERANCES[dtype]


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_whichever_thread_takes_a_piece_the_bits_are_the_same(threads: int) -> None:
    call = build(Case(seed=14, kv_heads=3, group=4, count=1900, capacity=1900))
    attend = library.load_library().functions.qsdpa_attend
    fields, out = prepared(call, threads)
    attend(fields, call.scale)
    shared: Any = out
    first = bytes(memoryview(shared))
    assert relative_error(out, attend_in_double(call)) <= TOLERANCES[call.queries.dtype]
    for _ in range(300):
        attend(fields, call.scale)
        assert bytes(memoryview(shared)) == first


def test_outputs_are_new_each_time() -> None:
    call = build(Case(seed=13, dtype=mx.bfloat16))
    first = backend.attend(call)
    kept = mx.array(first.astype(mx.float32))
    mx.eval(kept)
    other = replace(call, queries=-call.queries)
    assert relative_error(backend.attend(other), kept) > 0.01
    assert relative_error(first, kept) == 0


def test_threads_may_call_at_once() -> None:
    calls = [build(random_case(seed)) for seed in range(20, 26)]
    calls += [build(Case(seed=s, kv_heads=2, group=4, count=2000, capacity=2000)) for s in (1, 2)]
    wanted = [attend_in_double(call) for call in calls]
    failures: list[int] = []

    def hammer(first: int) -> None:
        for i in range(4 * len(calls)):
            k = (first + i) % len(calls)
            fields, out = prepared(calls[k], threads=3)
            library.load_library().functions.qsdpa_attend(fields, calls[k].scale)
            if relative_error(out, wanted[k]) > TOLERANCES[calls[k].queries.dtype]:
                failures.append(k)

    run_in_threads(hammer, 4)
    assert failures == []


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of Python 3.12 on
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    call = build(Case(seed=11, kv_heads=4, group=4, count=1500, capacity=1500))
    attend = library.load_library().functions.qsdpa_attend
    before, wanted = prepared(call, threads=3)
    attend(before, call.scale)
    after, out = prepared(call, threads=3)
    shared: Any = (wanted, out)
    expected_bytes, buffer = bytes(memoryview(shared[0])), memoryview(shared[1])
    child = os.fork()
    if child == 0:  # no MLX in here: its own threads did not come along
        attend(after, call.scale)
        os._exit(0 if bytes(buffer) == expected_bytes else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_keep_off_the_callers_core() -> None:
    if sys.platform != "linux":
        pytest.skip("threads choose no cores here")
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one core")
    call = build(Case(seed=11, kv_heads=4, group=4, count=1500, capacity=1500))
    fields, _ = prepared(call, threads=3)
    this_core = ctypes.CDLL(None).sched_getcpu
    for _ in range(50):
        before = this_core()
        library.load_library().functions.qsdpa_attend(fields, call.scale)
        if this_core() == before:  # else the system moved this thread in between
            break
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    assert os.sched_getaffinity(0) == allowed
    assert masks.count(allowed - {before}) >= 2


_STATE_AFTER = """
#include <immintrin.h>
/* The upper halves of vector registers in use after a call of the kernel, and not after they are cleared. */
__attribute__((visibility("default")))
int state_after(int (*attend)(const void *, double), const void *call, double scale) {
  attend(call, scale);
  const int after = (int)_xgetbv(1) & (1 << 2 | 1 << 6);
  _mm256_zeroupper();
  return after & ~(int)_xgetbv(1);
}
"""


def test_registers_are_left_as_code_for_sse_needs_them(tmp_path: Path) -> None:
    """MLX's own operations run at half the speed after a kernel that leaves something in their upper halves."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        flags = []
    if platform.machine() not in ("x86_64", "AMD64") or not {"avx", "xgetbv1"} <= set(flags):
        pytest.skip("the processor does not say which registers are in use")
    source, built = tmp_path / "state.c", tmp_path / "state.so"
    source.write_text(_STATE_AFTER)
    found = find_compiler()
    Compiler((*found.command, "-mavx", "-mxsave"), found.version).compile(source, built)
    state_after = ctypes.CDLL(str(built)).state_after
    for count in (100, 2048):
        for dtype in (mx.float16, mx.float32):
            call = build(Case(seed=count, kv_heads=3, group=3, count=count, capacity=count, dtype=dtype))
            for threads in (1, 3):
                fields, _ = prepared(call, threads)
                attend = ctypes.c_void_p(library.load_library().attend_address)
                assert {state_after(attend, fields, ctypes.c_double(call.scale)) for _ in range(20)} == {0}


@pytest.fixture(
    params=["-mno-avx512vnni", "-mno-avx512f", "-mno-avx512f -mno-avxvnni", "-mno-avx", "-mno-avx -DHAS_BYTE_DOTS=1"]
)
def narrow_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library made for narrower vectors than this CPU has, or without its products of bytes."""
    path = shutil.which("cc")
    if platform.machine() not in ("x86_64", "AMD64") or path is None:
        pytest.skip("the flags are those of cc on x86-64")
    monkeypatch.setenv("QSDPA_CACHE_DIR", str(tmp_path))
    built = library.find_or_build(Compiler((path, *request.param.split()), "test"))
    monkeypatch.setattr(library, "_outcome", built)


@pytest.mark.usefixtures("narrow_library")
def test_narrower_vectors() -> None:
    for seed in range(2000, 2050):
        check(build(random_case(seed)), seed)
    for seed in range(2000, 2004):
        check(build(random_case(seed, max_length=200)), seed)
        check(build(random_mla_case(seed)), seed)
    for bits in (4, 8):
        for group in (1, 2, 3, 4, 8):
            case = Case(seed=bits, group=group, count=200, capacity=200, key_dim=96, value_dim=160)
            formats = Format.affine(bits, 32)
            check(build(replace(case, key_format=formats, value_format=formats)), case)


def prepared(call: AttentionCall, threads: int) -> tuple[object, mx.array]:
    """The C structure of ``call`` for a given number of threads, and the array that it writes to."""
    sig = call.signature
    out = mx.zeros((sig.batch, sig.query_heads, sig.query_length, sig.value_dim), sig.dtype)
    mx.eval(out)
    arrays = plans.arrays_of(call)
    arrays[1] = out
    fields = plans.fill_fields(call, threads)
    library.load_library().read_views(arrays, fields)
    return fields, out
