"""What the doctor looks at. Each check gives findings: a line of fact, or a problem with its fix."""

from __future__ import annotations

import importlib
import os
import platform
import site
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.activation import untested_versions
from qsdpa_patch.adapter_registry import adapter_for, adapters
from qsdpa_patch.bench.machine import device_memory
from qsdpa_patch.dispatcher import router
from qsdpa_patch.kernels.attention_call import Signature
from qsdpa_patch.kernels.backends import BACKENDS, default_backend_name, load_backend
from qsdpa_patch.kernels.cpu import backend as cpu_backend
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.row_kernel import Rows
from qsdpa_patch.kernels.row_quantization import has_row_kernel
from qsdpa_patch.kernels.row_writing import can_write_rows
from qsdpa_patch.settings import installed_model_types, is_truthy, resolve_settings
from qsdpa_patch.targets import TARGETS, source_hash

__all__ = ["Finding", "all_findings"]

_UF_HIDDEN = 0x8000


@dataclass(frozen=True)
class Finding:
    """topic: what was looked at. text: what was found. fix: what to do about it, where it is a problem."""

    topic: str
    text: str
    fix: str = ""

    @property
    def is_problem(self) -> bool:
        return bool(self.fix)


def all_findings() -> Iterator[Finding]:
    """Every check, in the order in which a reader wants them."""
    yield from _versions()
    yield from _device()
    yield from _startup_hook()
    yield from _environment()
    yield from _targets()
    yield from _backends()
    yield from _kernels()
    yield from _row_kernels()
    yield from _cpu_library()
    yield from _models()


def _versions() -> Iterator[Finding]:
    names = ("qsdpa-patch", "mlx", "mlx-lm", "wrapt")
    yield Finding("versions", f"Python {platform.python_version()}, " + ", ".join(f"{n} {_version(n)}" for n in names))
    for message in untested_versions():
        yield Finding("versions", message, "install a tested version; until then only what still fits is patched")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def _device() -> Iterator[Finding]:
    info = mx.device_info()
    name = info.get("device_name") or info.get("architecture") or platform.processor() or platform.machine()
    memory = device_memory()
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    yield Finding("device", f"{mx.default_device()}: {name}{size}, {platform.platform()}")


def _startup_hook() -> Iterator[Finding]:
    """Whether ``QSDPA_PATCH=1`` works: the hook is in a folder where the interpreter runs such files."""
    topic = "start-up hook"
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    hooks = [path for folder in folders if (path := Path(folder) / "qsdpa_patch.pth").exists()]
    if not hooks:
        yield Finding(topic, "qsdpa_patch.pth is in no site-packages folder", "install the package with pip or uv")
    for hook in hooks:
        if getattr(os.stat(hook), "st_flags", 0) & _UF_HIDDEN or not os.stat(hook).st_mode & stat.S_IRUSR:
            yield Finding(topic, f"{hook} is hidden, so that Python skips it", f"chflags nohidden '{hook}'")
        elif sys.flags.no_site:
            yield Finding(topic, "Python runs with -S, which skips it", "leave -S out")
        else:
            yield Finding(topic, "in place: QSDPA_PATCH=1 enables the patch")


def _environment() -> Iterator[Finding]:
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith("QSDPA_")}
    yield Finding("environment", ", ".join(f"{k}={v}" for k, v in given.items()) or "no QSDPA_ variable is set")
    try:
        resolve_settings()
        is_truthy("QSDPA_PATCH", os.environ.get("QSDPA_PATCH", ""))
    except ValueError as error:
        yield Finding("environment", str(error), "correct or unset the variable")


def _targets() -> Iterator[Finding]:
    for target in TARGETS:
        original = target.find(importlib.import_module(target.module))
        original = getattr(original, "__wrapped__", original)
        if original is None:
            yield Finding("patching", f"{target.name} is gone from mlx-lm", "install a tested version of mlx-lm")
        elif mismatch := target.mismatch(original):
            yield Finding("patching", f"{target.name}: {mismatch}", "install a tested version of mlx-lm")
        elif source_hash(original) != target.sha256:
            yield Finding("patching", f"{target.name} is patched, though its source is not the tested one")
        else:
            yield Finding("patching", f"{target.name}")


def _backends() -> Iterator[Finding]:
    chosen = default_backend_name()
    for name in BACKENDS:
        try:
            backend = load_backend(name)
            available, reason = backend.is_available()
        except Exception as error:
            available, reason = False, str(error)
        if available:
            yield Finding("kernels", f"{name}: available{' (used by default)' if name == chosen else ''}")
        elif name == chosen:
            yield Finding("kernels", f"{name}: {reason}", "until then every call takes plain ops")
        else:
            yield Finding("kernels", f"{name}: {reason}")


def _cpu_library() -> Iterator[Finding]:
    """Where the CPU kernel's compiled library comes from; last, when the shapes above have made it ready."""
    facts = cpu_backend.describe()
    yield Finding("CPU kernel", ", ".join(f"{name}: {fact}" for name, fact in facts.items()))


def _kernels() -> Iterator[Finding]:
    """A few common shapes, decided as a model's call would be; the first time each is compiled and checked."""
    for dim in (64, 80, 128, 256, 512):
        for bits in (4, 8):
            signature = _decode_signature(dim, Format.affine(bits))
            start = time.perf_counter()
            fused, reason = router.has_fused_kernel(signature)
            seconds = time.perf_counter() - start
            text = f"decode D {dim}, {signature.key_format}, {dtype_name(signature.dtype)}: "
            yield Finding("kernels", text + (f"fused ({seconds:.2f} s to get ready)" if fused else f"ops: {reason}"))


def _row_kernels() -> Iterator[Finding]:
    """Whether one kernel quantizes keys and values that come new into a cache; likewise made ready here."""
    dtype, backend = _cache_dtype(), default_backend_name()
    for format in (Format.affine(4), Format.affine(8)):
        rows = Rows(format, dtype, 128, 2)
        start = time.perf_counter()
        taken, reason = has_row_kernel(backend, rows)
        in_place = can_write_rows(backend, rows)[0]
        seconds = time.perf_counter() - start
        how = f"one kernel{', straight into the buffers' if in_place else ''} ({seconds:.2f} s to get ready)"
        text = f"append D 128, {format}, {dtype_name(dtype)}: "
        yield Finding("kernels", text + (how if taken else f"ops: {reason}"))


def _cache_dtype() -> mx.Dtype:
    """Of the numbers in a cache that a model on this device usually has."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16


def _decode_signature(dim: int, format: Format) -> Signature:
    """One new token over a grouped cache with heads of ``dim``, as mlx-lm would call it on this device."""
    fitted, padded = format.fit(dim)
    dtype = _cache_dtype()
    return Signature(
        1, 32, 8, 1, padded, padded, dtype, fitted, fitted, dtype, dtype, "none", False, 0, False
    )  # fmt: skip


def _models() -> Iterator[Finding]:
    names = installed_model_types()
    own = {name: adapter_for(name).own_attention[name] for name in names if name in adapter_for(name).own_attention}
    yield Finding("models", f"{len(names)} modules in mlx-lm; adapters: {', '.join(a.name for a in adapters())}")
    for name, reason in sorted(own.items()):
        yield Finding("models", f"{name}: its cache is quantized, its attention takes no fused kernel: {reason}")
