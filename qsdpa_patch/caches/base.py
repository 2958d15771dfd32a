"""What all quantized caches share: formats, the encoding of new rows, and the state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from qsdpa_patch.caches.codec import as_format, fit_codec
from qsdpa_patch.caches.header import Header, read_header, write_header
from qsdpa_patch.caches.layout import Layout
from qsdpa_patch.caches.packed_rows import Rows, Span, append, capacity, select, view
from qsdpa_patch.caches.spare_rows import SpareRows
from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows
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


class QuantizedCache(_BaseCache, ABC):  # type: ignore[misc] # mlx-lm has no annotations
    """Keys and values of one layer, stored in formats of their own.

    ``rows`` are ``None`` until the first update, then the buffers ``[B, planes, capacity, width]`` of both, as the
    :class:`Layout` has them.

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

    _rows: Rows | None = None
    _spare: SpareRows | None = None
    _pending: PendingRows | None = None
    _most_in_place = 16
    """New rows of a sequence that a kernel may write into the buffers: of more, attention reads them otherwise."""
    offset: Any
    key_format: Format | None
    value_format: Format | None
    _layout: Layout | None

    def __init__(
        self, key_format: Format | str | None = DEFAULT_FORMAT, value_format: Format | str | None = "same"
    ) -> None:
        self.key_format = as_format(key_format, "key_format")
        self.value_format = self.key_format if value_format == "same" else as_format(value_format, "value_format")
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take over: all but the right to write into the buffers."""
        return {**self.__dict__, "_rows": self.rows, "_pending": None, "_spare": None}

    def empty(self) -> bool:
        return self._rows is None

    @property
    def rows(self) -> Rows | None:
        """The buffers, for any operation: with all rows in them, or sure to be there before it."""
        if self._pending is not None:
            self._settle(self._pending)
        return self._rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        """Other buffers, which others may share: none of their rows are spare."""
        self._rows, self._pending, self._spare = rows, None, None

    def _settle(self, pending: PendingRows) -> None:
        """Have the buffers depend on what a kernel writes into them."""
        spare = self._spare
        assert self._rows is not None
        self.rows = pending.then(self._rows)
        self._spare = spare

    @property
    def keys(self) -> Rows | None:
        """The buffers, under the name by which models make them depend on other arrays (pipeline parallelism)."""
        return self.rows

    @keys.setter
    def keys(self, rows: Rows) -> None:
        self.rows = rows

    @property
    def values(self) -> Rows | None:
        """The same buffers: those of keys and values are one list."""
        return self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(x.nbytes for x in self._rows or ())

    @property
    def state(self) -> tuple[Any, ...]:
        """Buffers, counters, and a header that says how to read them."""
        counters = (getattr(self, name) for name in self._counters)
        header = write_header(Header(self.key_format, self.value_format, self._layout))
        return self.rows, *counters, header

    @state.setter
    def state(self, state: Any) -> None:
        if not isinstance(state, list | tuple) or len(state) != len(self._counters) + 2:
            raise ValueError(
                f"a state of {type(self).__qualname__} has {len(self._counters) + 2} entries: {state!r:.200}"
            )
        rows, *counters, header = state
        content = read_header(header)
        length = _check_buffers(rows, content)
        for (name, kind), value in zip(self._counters.items(), counters):
            if type(value) is not kind:
                raise ValueError(f"the cache is damaged: its {name} is {value!r:.100}")
        end = self._end(dict(zip(self._counters, counters)))
        if not 0 <= end <= length:
            raise ValueError(f"the cache is damaged: its rows end at {end}, its buffers at {length}")
        self.key_format, self.value_format, self._layout = content
        self.rows = None if rows is None else list(rows)
        for name, value in zip(self._counters, counters):
            setattr(self, name, value)

    @staticmethod
    def _end(counters: dict[str, Any]) -> int:
        """Where in the buffers the next row goes."""
        return int(counters["offset"])

    def _buffers(self) -> Rows:
        """The buffers of a cache that has seen rows."""
        rows = self.rows
        if rows is None:
            raise ValueError(f"this {type(self).__qualname__} is empty")
        return rows

    @property
    def _capacity(self) -> int:
        """Number of rows that the buffers hold."""
        return 0 if self._rows is None else capacity(self._rows)

    def _append(self, start: int, keys: mx.array, values: mx.array, attends: bool, limit: int | None = None) -> None:
        """Store new rows from row ``start`` on, in buffers of up to ``limit`` rows.

        attends: whether whoever gets all rows, from :meth:`_hand_over`, only attends to them.
        """
        if not (attends and self._write_in_place(start, keys, values)):
            self.rows = rows = append(self.rows, start, self._encode(keys, values), limit)
            self._spare = SpareRows.after(start + keys.shape[2], rows)

    def _write_in_place(self, start: int, keys: mx.array, values: mx.array) -> bool:
        """Have a kernel write new rows straight into the buffers, from row ``start`` on, and say so if it can.

        For few rows, whose attention reads packed ones: whatever else needed them would have to wait for them.
        """
        rows, spare, pending, shape = self._rows, self._spare, self._pending, keys.shape
        if rows is None or spare is None or len(shape) != 4:
            return False
        if pending is not None and pending.awaited:  # of so many, attention takes another route, and will again
            self._most_in_place = min(self._most_in_place, pending.count - 1)
        batch, heads, count, _ = shape
        stop = start + count
        if count > self._most_in_place or not spare.hold(batch, heads + values.shape[1], start, stop):
            return False
        assert self._layout is not None
        write = self._layout.writer(keys, values)
        if write is None:
            return False
        after = None if pending is None else pending.token
        self._pending, spare.first = PendingRows([keys, values], write, rows, stop, after), stop
        return True

    def _encode(self, keys: mx.array, values: mx.array) -> Rows:
        """New rows as they are stored. The first ones fix how."""
        if self._layout is not None:
            return self._layout.encode(keys, values)
        layout = Layout(
            fit_codec(self.key_format, keys.shape[-1], keys.dtype),
            fit_codec(self.value_format, values.shape[-1], values.dtype),
        )
        encoded = layout.encode(keys, values)
        self._note_unrotated(layout)
        self._set_layout(layout)
        return encoded

    def _note_unrotated(self, layout: Layout) -> None:
        """Tell the report where rows cannot be rotated although their format says so."""
        tag = tag_of(self)
        sides = (self.key_format, layout.keys), (self.value_format, layout.values)
        for name, (asked, codec) in zip(("keys", "values"), sides):
            wanted, got = (format is not None and format.rotated for format in (asked, codec.format))
            if tag is not None and codec.dim and wanted and not got:
                recorder.note(
                    tag.model_type, tag.kind, f"{name} not rotated: {codec.dim} is no multiple of {MIN_BLOCK}"
                )

    def _set_layout(self, layout: Layout) -> None:
        self._layout = layout
        self.key_format, self.value_format = layout.keys.format, layout.values.format

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The rows kept, as attention gets them: a :class:`QuantizedTensor`, or plain where the format is ``None``."""
        rows = self._buffers()
        start, stop = self._span()
        kept = view(rows) if (start, stop) == (0, capacity(rows)) else select(rows, start, stop)
        return self._decode(kept)

    @abstractmethod
    def _span(self) -> Span:
        """Which rows of the buffers attention gets."""

    def _hand_over(self, attends: bool) -> tuple[Any, Any]:
        """:meth:`keys_and_values` for a function that may do nothing but attend to them: then without arrays."""
        assert self._layout is not None
        if attends and self._layout.quantized:
            assert self._rows is not None
            start, stop = self._span()
            rows = select(self._rows, start, stop) if start else self._rows
            return self._layout.members(rows, stop - start, self._pending)
        return self.keys_and_values()

    def _decode(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """Stored rows as attention gets them: a :class:`QuantizedTensor` each, or plain rows."""
        assert self._layout is not None
        return self._layout.decode(rows)

    def _take(self, source: QuantizedCache, rows: Rows) -> None:
        """Take over stored rows of ``source``, a cache of the same layer."""
        set_tag(self, tag_of(source))
        if source._layout is not None:
            self._set_layout(source._layout)
        self.rows = rows

    def _adopt(self, keys: mx.array | None, values: mx.array | None) -> None:
        """Take over the whole buffers of an unquantized cache.

        Evaluated at once: layers evaluated together would hold what all of them quantize, and what it is joined from.
        """
        if keys is not None and values is not None:
            self.rows = self._encode(keys, values)
            mx.eval(self.rows)


def _check_buffers(rows: Any, header: Header) -> int:
    """Length of the buffers. Raises ValueError unless the layout of ``header`` can read them."""
    if rows is None:
        return 0
    if header.layout is None:
        raise ValueError("the cache is damaged: it holds rows, but not how they are stored")
    if not isinstance(rows, list | tuple) or not all(isinstance(x, mx.array) for x in rows):
        raise ValueError(f"the cache is damaged: it holds {rows!r:.100} in place of arrays")
    try:
        header.layout.check(list(rows))
    except ValueError as error:
        raise ValueError(f"the cache is damaged: {error}") from None
    return capacity(list(rows))
