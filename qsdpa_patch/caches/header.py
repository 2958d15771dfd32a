"""The line of text in a cache's state that says how its rows are stored.

It travels with the arrays into ``save_prompt_cache`` files, so it has a version.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from qsdpa_patch.caches.codec import Codec, PlainCodec, QuantizingCodec
from qsdpa_patch.caches.layout import Layout
from qsdpa_patch.kernels.dtypes import dtype_name
from qsdpa_patch.kernels.format import Format

__all__ = ["VERSION", "Header", "read_header", "write_header"]

VERSION = 2
_DTYPES = {dtype_name(dtype): dtype for dtype in (mx.float16, mx.bfloat16, mx.float32)}


class Header(NamedTuple):
    """How keys and values are stored: their formats, and the layout once the first rows have fixed it."""

    key_format: Format | None
    value_format: Format | None
    layout: Layout | None


@lru_cache(maxsize=256)
def write_header(header: Header) -> str:
    """``header`` as text. Kept, since mlx-lm asks for the states of all caches to have them evaluated."""
    layout = header.layout
    keys = _side(header.key_format, None if layout is None else layout.keys)
    values = _side(header.value_format, None if layout is None else layout.values)
    return json.dumps({"version": VERSION, "keys": keys, "values": values})


def read_header(header: Any) -> Header:
    """What :func:`write_header` made ``header`` from.

    Raises:
        ValueError: it is no header, or that of another version.
    """
    try:
        content = json.loads(header)
        version = content["version"]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"no cache of qsdpa_patch was saved here: its header is {header!r:.200}") from None
    if version != VERSION:
        raise ValueError(f"the cache was saved in layout {version!r}; this qsdpa_patch reads layout {VERSION}")
    try:
        key_format, key_codec = _parse_side(content["keys"])
        value_format, value_codec = _parse_side(content["values"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"the header of the cache is damaged ({error!r}): {header!r:.300}") from None
    layout = None if key_codec is None or value_codec is None else Layout(key_codec, value_codec)
    return Header(key_format, value_format, layout)


def _side(format: Format | None, codec: Codec | None) -> dict[str, Any]:
    side: dict[str, Any] = {"format": None if format is None else asdict(format)}
    if codec is not None:
        side |= {"dim": codec.dim, "dtype": dtype_name(codec.dtype)}
    return side


def _parse_side(side: dict[str, Any]) -> tuple[Format | None, Codec | None]:
    format = None if side["format"] is None else Format(**side["format"])
    if "dim" not in side:
        return format, None
    dim, dtype = side["dim"], _DTYPES[side["dtype"]]
    return format, PlainCodec(dim, dtype) if format is None else QuantizingCodec(format, dim, dtype)
