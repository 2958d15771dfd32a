"""Fused attention over quantized KV caches for mlx-lm, patched in while it runs.

>>> import qsdpa_patch
>>> qsdpa_patch.enable()   # then use mlx-lm as always
"""

from importlib import import_module
from typing import Any

import qsdpa_patch.adapters  # noqa: F401 - first imported later, the package would hide the function of that name
from qsdpa_patch.activation import disable, enable, enabled, is_enabled
from qsdpa_patch.adapter import Adapter, Layer, LayerPlan
from qsdpa_patch.adapter_registry import adapters, register_adapter, unregister_adapter
from qsdpa_patch.dispatcher import quantized_scaled_dot_product_attention
from qsdpa_patch.errors import FallbackError, QSDPAWarning
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.quantized_tensor import QuantizedTensor, quantize
from qsdpa_patch.report import Report, recorder

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "FallbackError",
    "Format",
    "Layer",
    "LayerPlan",
    "QSDPAWarning",
    "QuantizedTensor",
    "Report",
    "adapters",
    "caches",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "quantize",
    "quantized_scaled_dot_product_attention",
    "register_adapter",
    "report",
    "reset_report",
    "unregister_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "caches":  # builds on mlx-lm, which `import qsdpa_patch` leaves unimported
        return import_module("qsdpa_patch.caches")
    raise AttributeError(f"module 'qsdpa_patch' has no attribute {name!r}")


def report() -> Report:
    """What went where since the patch was first enabled, or since :func:`reset_report`: ``print(report())``."""
    return recorder.report()


def reset_report() -> None:
    """Set all counts of :func:`report` to zero."""
    recorder.reset()
