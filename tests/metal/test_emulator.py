"""The emulator finds what it claims to find, and lets correct kernels through.

Each case is the body of a kernel over ``x``, 64 numbers, with the output ``y``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import pytest

from tests.metal.emulator import Emulator, MetalError
from tests.metal.emulator.worker_process import CHECK_RACES, SHUFFLE_ORDER

IDS = """
uint i = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint g = simdgroup_index_in_threadgroup;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Kernel:
    """``error``: what the message must contain; empty for a correct kernel."""

    name: str
    body: str
    error: str = ""
    header: str = ""
    dtype: mx.Dtype = mx.float32
    grid: int = 64
    threadgroup: int = 64
    outputs: int = 64
    size: int = 64
    atomic: bool = False


def run(emulator: Emulator, kernel: Kernel) -> mx.array:
    function = emulator.metal_kernel(
        "case", ["x"], ["y"], IDS + kernel.body, kernel.header, atomic_outputs=kernel.atomic
    )
    return function(
        inputs=[mx.arange(kernel.size).astype(kernel.dtype)],
        template=[("T", kernel.dtype)],
        grid=(kernel.grid, 1, 1),
        threadgroup=(kernel.threadgroup, 1, 1),
        output_shapes=[(kernel.outputs,)],
        output_dtypes=[kernel.dtype],
        init_value=0 if kernel.atomic else None,
    )[0]


CORRECT = [
    Kernel("a SIMD sum", "y[i] = simd_sum(x[i]);"),
    Kernel("an exchange behind a barrier", f"threadgroup float s[64]; s[i] = x[i]; {BARRIER} y[i] = s[63 - i];"),
    Kernel(
        "simdgroup_barrier between the lanes of one simdgroup",
        "threadgroup float s[64]; s[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[i ^ 1];",
    ),
    Kernel("a grid that threadgroups do not divide",
           "y[thread_position_in_grid.x] = x[i];", grid=50, threadgroup=32, outputs=50),
    Kernel("an aligned vector load", "auto p = (const device float4*)(x + 4 * (i / 8)); y[i] = p[0].x;"),
    Kernel("half from float, which Metal converts", "y[i] = x[i] * 1.5f;", dtype=mx.float16),
    Kernel("constants at program scope", "y[i] = v[i & 1];", header="constexpr constant float v[2] = {2.0f, 3.0f};\n"),
    Kernel("atomics", "atomic_fetch_add_explicit(&y[0], x[i], memory_order_relaxed);", atomic=True),
    Kernel("a literal without suffix is a float", "y[i] = sizeof(1.0 * x[i]) == 4 && sizeof(1e-3) == 4 ? 1 : 0;"),
    Kernel(
        "vector constructors",
        "float4 v = float4(x[i], 1, float2(2, 3)); v.xy = v.zw + 1; half4 h = half4(v); uint2 u = as_type<uint2>(h);"
        "vec<float, 2> w = vec<float, 2>(1, 2); y[i] = dot(v, float4(h)) + float(u.x * 0) + w.y;",
    ),
    Kernel(
        "a helper for each address space",
        f"threadgroup T s[64]; s[i] = x[i]; {BARRIER} y[i] = get(s, i) + get(x, i);",
        header="template <typename T> T get(const device T* p, uint i) { return p[i]; }\n"
        "template <typename T> T get(const threadgroup T* p, uint i) { return p[i]; }\n",
    ),
    Kernel(
        "two threadgroup variables in one declaration",
        f"threadgroup float s[64], t[64]; s[i] = x[i]; t[i] = 1; {BARRIER} y[i] = s[63 - i] + t[i ^ 1];",
    ),
]  # fmt: skip

AT_RUN_TIME = [
    Kernel("no barrier", "threadgroup float s[64]; s[i] = x[i]; y[i] = s[63 - i];",
           "uninitialised threadgroup memory"),
    Kernel("no barrier, with memory that is initialised",
           f"threadgroup float s[64]; s[i] = 0; {BARRIER} s[i] = x[i]; y[i] = s[63 - i];", "race: store after load"),
    Kernel(
        "no barrier before memory is used again",
        "threadgroup float s[2]; for (int r = 0; r < 3; r++) { float t = simd_sum(x[i]); if (lane == 0) s[g] = t;"
        f"{BARRIER} y[i] = s[1 - g]; }}",
        "threadgroup-memory race",
    ),
    Kernel(
        "uninitialised threadgroup memory",
        f"threadgroup float s[64]; if (lane == 0) s[g] = x[i]; {BARRIER} y[i] = s[lane];",
        "uninitialised threadgroup memory",
    ),
    Kernel("an output read before it is written", "y[i] += x[i];", "uninitialised output buffer 'y'"),
    Kernel("a load past the end", "y[i] = x[i + 1];", "out-of-bounds device load"),
    Kernel("a load before the start", "y[i] = x[int(i) - 1];", "out-of-bounds device load"),
    Kernel("a store past the end", "y[i + 1] = x[i];", "out-of-bounds device store"),
    Kernel(
        "past the end of a threadgroup array",
        "threadgroup float s[64]; auto p = &s[0]; p[i + 1] = x[i]; y[i] = 1;",
        "out-of-bounds threadgroup-memory",
    ),
    Kernel("a SIMD function in half of the lanes",
           "float v = 0; if (lane < 16) v = simd_sum(x[i]); y[i] = v;", "lanes 0000ffff only"),
    Kernel(
        "two SIMD functions at a time",
        "float v; if (lane < 16) v = simd_sum(x[i]);\n else v = simd_sum(2 * x[i]); y[i] = v;",
        "divergent SIMD-group operation",
    ),
    Kernel("a barrier in half of the threads", f"if (g == 0) {BARRIER} y[i] = x[i];", "reached by 32 of 64 threads"),
    Kernel("a barrier after an early return", f"if (i >= 60) return; {BARRIER} y[i] = x[i];", "reached by"),
    Kernel("two threadgroups store one number",
           "y[i % 8] = x[i];", "stored by two threadgroups", threadgroup=32, outputs=8),
    Kernel("an output never written", "if (i < 32) y[i] = x[i];", "128 bytes of output 'y' were never written"),
    Kernel(
        "more than 32 KB of threadgroup memory",
        f"threadgroup float s[8200]; s[i] = x[i]; {BARRIER} y[i] = s[i];",
        "exceeds the 32768-byte limit",
    ),
    Kernel("a private array out of range", "float a[4] = {0, 1, 2, 3}; y[i] = a[lane / 4];", "undefined behaviour"),
    Kernel("a misaligned vector",
           "auto p = (const device float4*)(x + 1); y[i] = p[0].x;", "misaligned vector"),
    Kernel("an integer division by zero", "y[i] = i / (i - i + uint(x[0]));", "divrem"),
    Kernel("a wild pointer", "auto p = (const device float*)(ulong(i) * 8 + 64); y[i] = p[0];", "bad memory access"),
    Kernel("a threadgroup of more than 1024 threads", "y[i] = 0;", "larger than 1024", grid=2048, threadgroup=2048),
]  # fmt: skip

AT_COMPILE_TIME = [
    Kernel("device memory through a threadgroup pointer",
           "const threadgroup float* p = x; y[i] = p[0];", "cannot initialize"),
    Kernel("device memory through a thread reference", "thread const float& r = x[i]; y[i] = r;", "address space"),
    Kernel("a pointer without an address space", "const float* p = x; y[i] = p[0];", "missing address space"),
    Kernel("one to a local array", "float a[2] = {1, 2}; float* p = a; y[i] = p[0];", "missing address space"),
    Kernel("a parameter without one", "float a[1] = {x[i]}; y[i] = f(a);", "missing address space",
           header="float f(const float* p) { return p[0]; }\n"),
    Kernel("a small input, which is in constant memory, as a device pointer", "y[i] = f(x);", "no matching function",
           header="template <typename T> T f(const device T* p) { return p[0]; }\n", size=4),
    Kernel("device memory by thread reference", "inc(y[i]);", "no matching function",
           header="void inc(thread float& v) { v += 1; }\n"),
    Kernel("a store to an input", "x[i] = 1; y[i] = 0;", "read-only"),
    Kernel("double", "double d = x[i]; y[i] = d;", "double"),
    Kernel("max of int and uint", "y[i] = max(int(i), i);", "ambiguous"),
    Kernel("max of float and half", "y[i] = max(x[i], half(1));", "ambiguous"),
    Kernel("bfloat from float", "y[i] = x[i] * 1.5f;", "loses floating-point precision", dtype=mx.bfloat16),
    Kernel("a variable at program scope that is not constant",
           "y[i] = v;", "program scope", header="const float v = 2.0f;\n"),
    Kernel("a vector of too few numbers",
           "float4 v = float4(1, 2, 3); y[i] = v.x;", "wrong number of vector components"),
    Kernel("new", "thread float* p = new float; y[i] = *p;", "error"),
    Kernel("a lambda", "auto f = [](float v) { return 2 * v; }; y[i] = f(x[i]);", "a lambda is not in Metal 3.1"),
    Kernel("a source that is not ASCII", "/* \u00d7 */ y[i] = x[i];", "as ASCII"),
    Kernel("C++17, which Metal 3 is not", "Pair p(x[i], 1.0f); y[i] = p.a;", "newer than C++14",
           header="template <typename T> struct Pair { T a, b; Pair(T a, T b) : a(a), b(b) {} };\n"),
    Kernel("a variable named as an address space",
           "float object_data = x[i]; y[i] = object_data;", "'object_data' is a keyword"),
    Kernel("a variable named as a stage", "float fragment = x[i]; y[i] = fragment;", "'fragment' is a keyword"),
]  # fmt: skip


def names(kernels: list[Kernel]) -> list[str]:
    return [k.name for k in kernels]


@pytest.mark.parametrize("kernel", CORRECT, ids=names(CORRECT))
def test_correct_kernels_run(emulator: Emulator, kernel: Kernel) -> None:
    assert mx.isfinite(run(emulator, kernel)).all()


@pytest.mark.parametrize("kernel", [*AT_RUN_TIME, *AT_COMPILE_TIME], ids=names([*AT_RUN_TIME, *AT_COMPILE_TIME]))
def test_faults_are_found(emulator: Emulator, kernel: Kernel) -> None:
    with pytest.raises(MetalError) as found:
        run(emulator, kernel)
    assert kernel.error in str(found.value)


def test_a_kernel_that_crashes_its_process_is_a_fault_and_the_next_one_runs(emulator: Emulator) -> None:
    endless_recursion = "int f(int n) { volatile int a[64]; a[n & 63] = n; return f(n + 1) + a[n & 63]; }\n"
    with pytest.raises(MetalError):
        run(emulator, Kernel("recursion", "y[i] = f(int(i));", header=endless_recursion))
    assert run(emulator, CORRECT[0])[0].item() == sum(range(32))


def test_the_order_of_threads_can_be_shuffled(emulator: Emulator) -> None:
    shuffled = Emulator(CHECK_RACES | SHUFFLE_ORDER)
    for kernel in CORRECT[:3]:
        assert mx.array_equal(run(shuffled, kernel), run(emulator, kernel))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_matrix_products(emulator: Emulator, dtype: mx.Dtype) -> None:
    body = """
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
      simdgroup_matrix<T, 8, 8> left, right;
      simdgroup_load(left, a + k, K);
      simdgroup_load(right, b + k, K, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    simdgroup_store(sum, y, 8);
    thread auto& e = sum.thread_elements();
    float all = simd_sum(e[0] + e[1]);
    if (thread_index_in_simdgroup == 0) total[0] = all;
    """
    a, b = (mx.random.normal((8, 64), key=mx.random.key(i)).astype(dtype) for i in (1, 2))
    product, total = emulator.metal_kernel("product", ["a", "b"], ["y", "total"], body)(
        inputs=[a, b], template=[("T", dtype), ("K", 64)], grid=(32, 1, 1), threadgroup=(32, 1, 1),
        output_shapes=[(8, 8), (1,)], output_dtypes=[mx.float32] * 2,
    )  # fmt: skip
    wanted = a.astype(mx.float32) @ b.astype(mx.float32).T
    assert mx.allclose(product, wanted, atol=1e-5)
    assert mx.allclose(total, wanted.sum(), atol=1e-4)
    assert emulator.costs[-1].ops == {"matrix": 8, "sum": 1}


def test_shuffles_and_reductions(emulator: Emulator) -> None:
    body = """
    uint i = thread_index_in_simdgroup;
    float v = x[i];
    y[i] = simd_shuffle_xor(v, ushort(5));
    y[32 + i] = simd_shuffle_down(v, 3);
    y[64 + i] = simd_broadcast(v, 7);
    y[96 + i] = simd_shuffle(v, ushort((i * 7) % 32));
    y[128 + i] = simd_sum(float4(v, 1, 2, 3)).y;
    y[160 + i] = simd_max(half(v));
    y[192 + i] = simd_min(int(i) + 3);
    y[224 + i] = simd_prefix_inclusive_sum(v);
    """
    out = emulator.metal_kernel("shuffles", ["x"], ["y"], body)(
        inputs=[mx.arange(32).astype(mx.float32)], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(8, 32)],
        output_dtypes=[mx.float32],
    )[0].astype(mx.int32).tolist()  # fmt: skip
    lanes = range(32)
    assert out == [
        [i ^ 5 for i in lanes],
        [i + 3 if i + 3 < 32 else i for i in lanes],
        [7] * 32,
        [i * 7 % 32 for i in lanes],
        [32] * 32,
        [31] * 32,
        [3] * 32,
        [i * (i + 1) // 2 for i in lanes],
    ]


def test_denormal_floats_are_zero_and_denormal_halves_are_not(emulator: Emulator) -> None:
    """As on Apple GPUs, whose hardware can do neither otherwise."""
    body = "y[0] = x[0] * x[1]; z[0] = as_type<half>(ushort(1)) * half(x[2]);"
    product, half = emulator.metal_kernel("denormals", ["x"], ["y", "z"], body)(
        inputs=[mx.array([1e-20, 1e-20, 2.0])], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,), (1,)],
        output_dtypes=[mx.float32, mx.float16],
    )  # fmt: skip
    assert product.item() == 0
    assert half.view(mx.uint16).item() == 2


def test_more_buffers_than_metal_has_are_refused(emulator: Emulator) -> None:
    names = [f"x{i}" for i in range(31)]
    with pytest.raises(MetalError, match="32 buffers, where Metal has 31"):
        emulator.metal_kernel("buffers", names, ["y"], "y[0] = x0[0];")(
            inputs=[mx.zeros(8)] * 31, grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_floats_round_after_every_operation(emulator: Emulator, dtype: mx.Dtype) -> None:
    a, b, c = (mx.random.normal((4096,), key=mx.random.key(i)).astype(dtype) for i in range(3))
    body = "uint i = thread_position_in_grid.x; y[i] = T(T(a[i] * b[i]) + c[i]);"
    out = emulator.metal_kernel("rounding", ["a", "b", "c"], ["y"], body)(
        inputs=[a, b, c], template=[("T", dtype)], grid=(4096, 1, 1), threadgroup=(256, 1, 1), output_shapes=[(4096,)],
        output_dtypes=[dtype],
    )[0]  # fmt: skip
    assert mx.array_equal(out, a * b + c)


def test_instructions_are_counted_by_kind_and_element(emulator: Emulator) -> None:
    body = """
    uint i = thread_index_in_simdgroup;
    float2 v = float2(x[i], x[i + 32]);
    v *= x[0];
    y[i] = v.x;
    y[32 + i] = v.y;
    y[64 + i] = exp(x[i]);
    y[96 + i] = float((uint(x[i]) >> 3) & 5u);
    """
    counting = Emulator(count_instructions=True)
    for each in (emulator, counting):
        each.metal_kernel("counted", ["x"], ["y"], body)(
            inputs=[mx.arange(64).astype(mx.float32)], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(128,)],
            output_dtypes=[mx.float32],
        )  # fmt: skip
    counts = counting.costs[0].instructions
    of_a_lane = {kind: counts[kind] / 32 for kind in ("float", "exp", "convert", "shift", "bitwise", "multiply")}
    assert of_a_lane == {"float": 2, "exp": 1, "convert": 2, "shift": 1, "bitwise": 1, "multiply": 0}
    assert emulator.costs[0].buffers["x"].load_bytes == 4 * 5 * 32


@pytest.mark.parametrize(("readers", "from_memory"), [("true", 1), ("t == 0 || t == 3", 1), ("t == 0 || t == 4", 2)])
def test_what_threadgroups_in_a_row_read_comes_from_memory_once(
    emulator: Emulator, readers: str, from_memory: int
) -> None:
    body = f"""
    uint t = threadgroup_position_in_grid.x;
    y[thread_position_in_grid.x] = {readers} ? x[thread_index_in_simdgroup] : 0.0f;
    """
    emulator.metal_kernel("rereading", ["x"], ["y"], body)(
        inputs=[mx.arange(32).astype(mx.float32)], grid=(256, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(256,)],
        output_dtypes=[mx.float32],
    )  # fmt: skip
    read = emulator.costs[0].buffers["x"]
    assert read.unique_bytes == 128
    assert read.neighbour_unique_bytes == 128 * from_memory
    assert read.threadgroup_unique_bytes == 128 * (8 if readers == "true" else 2)


def test_slices_are_read_in_place_and_nothing_beside_them(emulator: Emulator) -> None:
    def read(body: str) -> mx.array:
        return emulator.metal_kernel("slice", ["x"], ["y"], body, ensure_row_contiguous=False)(
            inputs=[mx.arange(64).reshape(4, 16)[:, 2:6]], grid=(16, 1, 1), threadgroup=(16, 1, 1),
            output_shapes=[(4, 4)], output_dtypes=[mx.int32],
        )[0]  # fmt: skip

    index = "uint i = thread_position_in_grid.x; y[i] = x[i / 4 * x_strides[0] + i % 4"
    assert read(f"{index}];").tolist() == mx.arange(64).reshape(4, 16)[:, 2:6].tolist()
    with pytest.raises(MetalError, match=r"buffer 'x'.*outside of the slice"):
        read(f"{index} + 1];")
