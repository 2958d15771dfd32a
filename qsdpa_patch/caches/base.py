"""What all quantized caches share: formats, the encoding of new rows, and the state."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from qsdpa_patch.caches.codec import Codec, as_format, fit_codec
from qsdpa_patch.caches.header import Header, read_header, write_header
from qsdpa_patch.caches.packed_rows import Rows
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.rotation import MIN_BLOCK
from qsdpa_patch.layer_tags import set_tag, tag_of
from qsdpa_patch.report import recorder

__all__ = ["DEFAULT_FORMAT", "SAVED_CLASSES", "QuantizedCache", "saved"]

DEFAULT_FORMAT = Format.affine(8)

SAVED_CLASSES: dict[str, type[QuantizedCache]] = {}
"""The names under which ``save_prompt_cache`` files know the classes here. mlx-lm looks such a name up among the
globals of ``mlx_lm.models.cache`` when it loads a file."""

C = TypeVar("C", bound="type[QuantizedCache]")


def saved(cls: C) -> C:
    """Give ``cls`` a name of its own in files, apart from mlx-lm's classes of today and of tomorrow.

    mlx-lm writes ``type(cache).__name__``, and has a ``QuantizedKVCache`` itself. ``__qualname__`` stays.
    """
    cls.__name__ = f"QSDPA{cls.__name__}"
    SAVED_CLASSES[cls.__name__] = cls
    return cls


class QuantizedCache(_BaseCache):  # type: ignore[misc] # mlx-lm has no annotations
    """Keys and values of one layer, stored in formats of their own.

    ``keys`` and ``values`` are ``None`` until the first update, then lists of buffers ``[B, H, capacity, width]``:
    codes, scales and biases, or the rows alone where the side's format is ``None``.

    Args:
        key_format: how keys are stored: a :class:`Format`, the name of a floating-point one, or ``None`` to leave
            them as they are.
        value_format: likewise for values; ``"same"`` is that of the keys.

    The first update fits each format to its head dim (:meth:`Format.fit`); the attributes ``key_format`` and
    ``value_format`` then hold what it came to.

    Raises:
        TypeError, ValueError: for a format that there is not.
    """

    _counters: ClassVar[dict[str, type]] = {"offset": int}
    """Attributes that the state holds beside the buffers, and their types."""

    keys: Rows | None
    values: Rows | None
    offset: Any
    key_format: Format | None
    value_format: Format | None
    _codecs: tuple[Codec, Codec] | None

    def __init__(
        self, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> None:
        self.keys = self.values = None
        self.key_format = as_format(key_format, "key_format")
        self.value_format = self.key_format if value_format == "same" else as_format(value_format, "value_format")
        self._codecs = None

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(x.nbytes for rows in (self.keys, self.values) if rows is not None for x in rows)

    @property
    def state(self) -> tuple[Any, ...]:
        """Buffers, counters, and a header that says how to read them."""
        counters = (getattr(self, name) for name in self._counters)
        header = write_header(Header(self.key_format, self.value_format, self._codecs))
        return self.keys, self.values, *counters, header

    @state.setter
    def state(self, state: Any) -> None:
        if not isinstance(state, list | tuple) or len(state) != len(self._counters) + 3:
            raise ValueError(
                f"a state of {type(self).__qualname__} has {len(self._counters) + 3} entries: {state!r:.200}"
            )
        keys, values, *counters, header = state
        content = read_header(header)
        length = _check_buffers(keys, values, content)
        for (name, kind), value in zip(self._counters.items(), counters):
            if type(value) is not kind:
                raise ValueError(f"the cache is damaged: its {name} is {value!r:.100}")
        end = self._end(dict(zip(self._counters, counters)))
        if not 0 <= end <= length:
            raise ValueError(f"the cache is damaged: its rows end at {end}, its buffers at {length}")
        self.key_format, self.value_format, self._codecs = content
        self.keys = None if keys is None else list(keys)
        self.values = None if values is None else list(values)
        for name, value in zip(self._counters, counters):
            setattr(self, name, value)

    @staticmethod
    def _end(counters: dict[str, Any]) -> int:
        """Where in the buffers the next row goes."""
        return int(counters["offset"])

    def _buffers(self) -> tuple[Rows, Rows]:
        """Keys and values of a cache that has seen rows."""
        if self.keys is None or self.values is None:
            raise ValueError(f"this {type(self).__qualname__} is empty")
        return self.keys, self.values

    def _encode(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """New rows as they are stored. The first ones fix how."""
        if self._codecs is None:
            key_codec = fit_codec(self.key_format, keys.shape[-1], keys.dtype)
            value_codec = fit_codec(self.value_format, values.shape[-1], values.dtype)
            encoded = key_codec.encode(keys), value_codec.encode(values)
            self._note_unrotated(key_codec, value_codec)
            self._set_codecs(key_codec, value_codec)
            return encoded
        key_codec, value_codec = self._codecs
        return key_codec.encode(keys), value_codec.encode(values)

    def _note_unrotated(self, *codecs: Codec) -> None:
        """Tell the report where rows cannot be rotated although their format says so."""
        tag = tag_of(self)
        for name, asked, codec in zip(("keys", "values"), (self.key_format, self.value_format), codecs):
            wanted, got = (format is not None and format.rotated for format in (asked, codec.format))
            if tag is not None and codec.dim and wanted and not got:
                recorder.note(
                    tag.model_type, tag.kind, f"{name} not rotated: {codec.dim} is no multiple of {MIN_BLOCK}"
                )

    def _set_codecs(self, keys: Codec, values: Codec) -> None:
        self._codecs = keys, values
        self.key_format, self.value_format = keys.format, values.format

    def _decode(self, keys: Rows, values: Rows) -> tuple[mx.array, mx.array]:
        """Stored rows as attention gets them: a :class:`QuantizedTensor`, or plain rows."""
        assert self._codecs is not None
        key_codec, value_codec = self._codecs
        return key_codec.decode(keys), value_codec.decode(values)

    def _take(self, source: QuantizedCache, keys: Rows, values: Rows) -> None:
        """Take over stored rows of ``source``, a cache of the same layer."""
        set_tag(self, tag_of(source))
        if source._codecs is not None:
            self._set_codecs(*source._codecs)
        self.keys, self.values = keys, values

    def _adopt(self, keys: mx.array | None, values: mx.array | None) -> None:
        """Take over the whole buffers of an unquantized cache. Lazy: they are freed when nothing else holds them."""
        if keys is not None and values is not None:
            self.keys, self.values = self._encode(keys, values)


def _check_buffers(keys: Any, values: Any, header: Header) -> int:
    """Length of the buffers. Raises ValueError unless the codecs of ``header`` can read them."""
    if keys is None and values is None:
        return 0
    if keys is None or values is None or header.codecs is None:
        raise ValueError("the cache is damaged: its keys, values and head dims are there only in part")
    for codec, rows in zip(header.codecs, (keys, values)):
        if not isinstance(rows, list | tuple) or not all(isinstance(x, mx.array) for x in rows):
            raise ValueError(f"the cache is damaged: it holds {rows!r:.100} in place of arrays")
        codec.check(list(rows))
    if keys[0].shape[:3] != values[0].shape[:3]:
        raise ValueError(f"the cache is damaged: keys {keys[0].shape} and values {values[0].shape} differ")
    return int(keys[0].shape[2])
