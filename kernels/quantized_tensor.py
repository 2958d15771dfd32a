"""QuantizedTensor: a quantized tensor that is an array.

``mlx.core.array`` can be subclassed. An instance made from a lazy dequantize node is taken by every MLX op, which then
sees the dequantized values, and decays to a plain array under any op; the node is never evaluated unless something
uses it. Kernels take the packed parts instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from qsdpa_patch.kernels.format import Format
from qsdpa_patch.kernels.pending_rows import PendingRows
from qsdpa_patch.kernels.rotation import rotate

__all__ = [
    "PackedStack",
    "QuantizedTensor",
    "StackMember",
    "dequantize_parts",
    "quantize",
    "quantize_parts",
    "stack_alike",
    "stack_parts",
]

_SCALE_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


class QuantizedTensor(mx.array):
    """A quantized tensor ``[..., N, dim]`` that any MLX op reads as its dequantized values.

    Args:
        codes: ``[..., N, format.words(padded_dim)]`` uint32, where ``padded_dim`` is ``dim`` rounded up to 32.
        scales: ``[..., N, format.groups(padded_dim)]``; float16, bfloat16 or float32 for affine formats, uint8
            otherwise.
        biases: like ``scales`` for affine formats that are not symmetric, else ``None``.
        format: how the rows are packed.
        dim: logical row length; by default what ``codes`` holds.
        dtype: of the dequantized values. By default that of ``scales``, or bfloat16 for floating-point formats.

    The parts may be slices of larger buffers. Build one with :func:`quantize`, or from the parts of
    :func:`mlx.core.quantize`.

    Attributes:
        format, dim: as given.
        padded_dim: stored row length, ``dim`` rounded up to a multiple of 32.
        scale_dtype: that of the scales.
        stack, index: the :class:`PackedStack` that the tensor is one of, or ``None``, and which one of it.

    Raises:
        ValueError, TypeError: when a part's shape or dtype does not fit ``format``.
    """

    format: Format
    dim: int
    padded_dim: int
    scale_dtype: mx.Dtype
    stack: PackedStack | None
    index: int
    _parts: tuple[mx.array, ...] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> QuantizedTensor:
        return mx.array.__new__(cls)

    def __init__(
        self,
        codes: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        format: Format,
        *,
        dim: int | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        padded = codes.shape[-1] * 32 // format.bits
        dim = padded if dim is None else dim
        _check_parts(codes, scales, biases, format, padded, dim)
        super().__init__(_logical(dequantize_parts(codes, scales, biases, format, dtype), format, dim))
        self.format, self.dim, self.padded_dim, self.scale_dtype = format, dim, padded, scales.dtype
        self.stack, self.index = None, 0
        self._parts = (codes, scales) if biases is None else (codes, scales, biases)

    @classmethod
    def _of_stack(cls, values: mx.array, index: int, attributes: dict[str, Any]) -> QuantizedTensor:
        """Tensor ``index`` of a stack, with its dequantized values (lazy) and the attributes that all of them have."""
        tensor = mx.array.__new__(cls)
        mx.array.__init__(tensor, values)
        tensor.__dict__.update(attributes)
        tensor.index = index
        return tensor

    @property
    def parts(self) -> tuple[mx.array, ...]:
        """Codes, scales and, where the format has them, biases."""
        if self._parts is None:
            assert self.stack is not None
            self._parts = self.stack.parts(self.index)
        return self._parts

    @property
    def codes(self) -> mx.array:
        return self.parts[0]

    @property
    def scales(self) -> mx.array:
        return self.parts[1]

    @property
    def biases(self) -> mx.array | None:
        return self.parts[2] if self.format.has_biases else None

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed parts (``nbytes`` is that of the dequantized values)."""
        return sum(p.nbytes for p in self.parts)

    def map_parts(self, function: Callable[[mx.array], mx.array]) -> QuantizedTensor:
        """The tensor whose parts are ``function`` of this one's: a slice along any axis but the last, say."""
        codes, scales, *biases = map(function, self.parts)
        return QuantizedTensor(
            codes, scales, biases[0] if biases else None, self.format, dim=self.dim, dtype=self.dtype
        )

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> mx.array:
        """The same packed values, read in another floating-point dtype; in any other dtype a plain array."""
        if dtype not in _SCALE_DTYPES:
            return super().astype(dtype, stream=stream)
        return QuantizedTensor(self.codes, self.scales, self.biases, self.format, dim=self.dim, dtype=dtype)

    def dequantize(self, dtype: mx.Dtype | None = None, *, stored: bool = False) -> mx.array:
        """The values as a plain array ``[..., N, dim]``, computed in ``dtype`` (by default the tensor's own).

        With ``stored``, rows as they are packed: of length ``padded_dim``, and rotated where the format is.
        """
        dtype = self.dtype if dtype is None else dtype
        scales, biases = self.scales, self.biases
        if self.format.is_affine and dtype != scales.dtype:
            scales = scales.astype(dtype)
            biases = None if biases is None else biases.astype(dtype)
        values = dequantize_parts(self.codes, scales, biases, self.format, dtype)
        return values if stored else _logical(values, self.format, self.dim)

    def __repr__(self) -> str:
        return f"QuantizedTensor(shape={tuple(self.shape)}, format='{self.format}', dtype={self.dtype})"


class PackedStack:
    """Tensors of one format, shape and dtype whose packed rows share two arrays, stacked along the head axis.

    A cache keeps keys and values so: one write to each array appends to both, and a kernel takes two arrays for six.

    Args:
        codes: ``[B, count * H, N, words]`` uint32, tensor by tensor.
        scales: ``[B, count * H, N, groups]``, tensor by tensor; for formats with biases ``[B, 2 * count * H, N,
            groups]``, all scales before all biases. Dtypes as for :class:`QuantizedTensor`.
        count: how many tensors there are.
        format, dim, dtype: of each tensor.
        signatures: what calls over a cache's stacks, this one and those of other steps, were found to be (see
            :func:`~qsdpa_patch.kernels.attention_call.check_call`).
        rows: how many rows of the arrays belong to the tensors, from the first on; by default all.
        pending: those of them that a kernel may still have to write (:mod:`qsdpa_patch.kernels.row_writing`).

    Attributes:
        buffers: the arrays as given.
        codes, scales: the ``rows`` of them, as views that are made when they are asked for, and there once the pending
            rows are.

    Nothing is checked here, since a cache makes one at each step: see :meth:`check`.
    """

    __slots__ = ("_views", "buffers", "count", "dim", "dtype", "format", "pending", "rows", "signatures")

    def __init__(
        self,
        codes: mx.array,
        scales: mx.array,
        count: int,
        format: Format,
        *,
        dim: int,
        dtype: mx.Dtype,
        signatures: dict[Any, Any] | None = None,
        rows: int | None = None,
        pending: PendingRows | None = None,
    ) -> None:
        self.buffers = (codes, scales)
        self.pending = pending
        self.rows = codes.shape[2] if rows is None else rows
        self._views: tuple[mx.array, mx.array] | None = None
        self.count = count
        self.format = format
        self.dim = dim
        self.dtype = dtype
        self.signatures = {} if signatures is None else signatures

    @property
    def codes(self) -> mx.array:
        return self._view()[0]

    @property
    def scales(self) -> mx.array:
        return self._view()[1]

    def _view(self) -> tuple[mx.array, mx.array]:
        if self._views is None:
            codes, scales = self.buffers if self.pending is None else self.pending.then([*self.buffers])
            if codes.shape[2] != self.rows:
                codes, scales = codes[:, :, : self.rows], scales[:, :, : self.rows]
            self._views = codes, scales
        return self._views

    @property
    def padded_dim(self) -> int:
        """Stored row length: ``dim`` rounded up to a multiple of 32."""
        return self.buffers[0].shape[-1] * 32 // self.format.bits

    def tensors(self) -> list[QuantizedTensor]:
        """The tensors ``[B, H, N, dim]``, in order."""
        format, dim, scales, biases = self.format, self.dim, self.scales, None
        if format.has_biases:
            scales, biases = mx.split(scales, 2, axis=1)
        stored = dequantize_parts(self.codes, scales, biases, format, self.dtype)
        values = _logical(stored, format, dim)
        each = [values] if self.count == 1 else mx.split(values, self.count, axis=1)
        shared = {
            "format": format, "dim": dim, "padded_dim": stored.shape[-1], "scale_dtype": scales.dtype, "stack": self,
            "_parts": None,
        }  # fmt: skip
        return [QuantizedTensor._of_stack(x, i, shared) for i, x in enumerate(each)]

    def members(self) -> list[StackMember]:
        """The same tensors for attention alone."""
        batch, planes, _, _ = self.buffers[0].shape
        shape = (batch, planes // self.count, self.rows, self.dim)
        return [StackMember(self, index, shape) for index in range(self.count)]

    def parts(self, index: int) -> tuple[mx.array, ...]:
        """Codes, scales and, where the format has them, biases of tensor ``index``, as views."""
        heads = self.codes.shape[1] // self.count
        first, stop = index * heads, (index + 1) * heads
        codes = self.codes if self.count == 1 else self.codes[:, first:stop]
        if not self.format.has_biases:
            return codes, self.scales if self.count == 1 else self.scales[:, first:stop]
        offset = self.codes.shape[1]
        return codes, self.scales[:, first:stop], self.scales[:, first + offset : stop + offset]

    def check(self) -> None:
        """Raise ValueError or TypeError unless the arrays are such a stack."""
        if self.codes.ndim != 4 or self.scales.ndim != 4:
            raise ValueError(f"codes {tuple(self.codes.shape)} and scales {tuple(self.scales.shape)} have no heads")
        planes = self.codes.shape[1]
        expected = planes * (1 + self.format.has_biases)
        if planes % self.count or self.scales.shape[1] != expected:
            raise ValueError(f"{self.count} tensors in {planes} planes of codes, {self.scales.shape[1]} of scales")
        for index in range(self.count):
            parts = self.parts(index)
            biases = parts[2] if self.format.has_biases else None
            _check_parts(parts[0], parts[1], biases, self.format, self.padded_dim, self.dim)


class StackMember:
    """A tensor of a :class:`PackedStack` for attention alone: what kernels read of it, at a fraction of the cost.

    Whatever else is asked of it, a :class:`QuantizedTensor` that is made then answers.
    """

    __slots__ = ("_tensor", "index", "shape", "stack")

    def __init__(self, stack: PackedStack, index: int, shape: tuple[int, ...]) -> None:
        self.stack = stack
        self.index = index
        self.shape = shape
        self._tensor: QuantizedTensor | None = None

    @property
    def format(self) -> Format:
        return self.stack.format

    @property
    def dim(self) -> int:
        return self.stack.dim

    @property
    def dtype(self) -> mx.Dtype:
        return self.stack.dtype

    @property
    def padded_dim(self) -> int:
        """Stored row length: ``dim`` rounded up to a multiple of 32."""
        return self.stack.padded_dim

    @property
    def scale_dtype(self) -> mx.Dtype:
        return self.stack.buffers[1].dtype

    @property
    def tensor(self) -> QuantizedTensor:
        """The same tensor as an array."""
        if self._tensor is None:
            self._tensor = self.stack.tensors()[self.index]
        return self._tensor

    @property
    def parts(self) -> tuple[mx.array, ...]:
        """Codes, scales and, where the format has them, biases."""
        return self.stack.parts(self.index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def stack_parts(tensors: Sequence[Sequence[mx.array]]) -> list[mx.array]:
    """Codes and scales of the :class:`PackedStack` of tensors given by their parts ``[B, H, N, width]``."""
    codes, *others = zip(*tensors, strict=True)
    scales = [part for kind in others for part in kind]
    return [mx.concatenate(list(x), axis=1) if len(x) > 1 else x[0] for x in (codes, scales)]


def stack_alike(keys: QuantizedTensor, values: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor] | None:
    """The same keys and values in one :class:`PackedStack`, as a cache has them; ``None`` where they are not alike."""
    if (keys.format, keys.dim, keys.scale_dtype) != (values.format, values.dim, values.scale_dtype):
        return None
    codes, scales = stack_parts([keys.parts, values.parts])
    keys, values = PackedStack(codes, scales, 2, keys.format, dim=keys.dim, dtype=keys.dtype).tensors()
    return keys, values


def _logical(stored: mx.array, format: Format, dim: int) -> mx.array:
    """The rows that were packed as ``stored``: without padding or rotation."""
    values = stored if dim == stored.shape[-1] else stored[..., :dim]
    return rotate(values) if format.rotated else values


def _check_parts(
    codes: mx.array, scales: mx.array, biases: mx.array | None, format: Format, padded: int, dim: int
) -> None:
    """Raise unless the parts are those of a tensor in ``format`` with rows of ``dim`` numbers."""
    if codes.dtype != mx.uint32:
        raise TypeError(f"codes are {codes.dtype}: packed codes are uint32")
    if format.words(padded) != codes.shape[-1] or padded % format.group_size:
        raise ValueError(f"codes with {codes.shape[-1]} words a row hold no whole number of groups of {format}")
    if not padded - 32 < dim <= padded:
        raise ValueError(f"dim={dim} does not fit codes that hold rows of {padded} numbers")
    expected = (*codes.shape[:-1], format.groups(padded))
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales have shape {tuple(scales.shape)}: {format} with these codes takes {expected}")
    if format.is_affine and scales.dtype not in _SCALE_DTYPES:
        raise TypeError(f"scales are {scales.dtype}: affine formats take float16, bfloat16 or float32")
    if not format.is_affine and scales.dtype != mx.uint8:
        raise TypeError(f"scales are {scales.dtype}: {format} takes uint8")
    if format.has_biases != (biases is not None):
        raise ValueError(
            f"biases are {'missing' if biases is None else 'given'}: {format} stores "
            f"{'one' if format.has_biases else 'none'} for each group"
        )
    if biases is not None and (biases.shape != scales.shape or biases.dtype != scales.dtype):
        raise ValueError(
            f"biases {tuple(biases.shape)} {biases.dtype} differ from scales {tuple(scales.shape)} {scales.dtype}"
        )


def dequantize_parts(
    codes: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    format: Format,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """The values of packed rows as they are stored, as a lazy array. See :class:`QuantizedTensor` for the arguments."""
    if format.symmetric:
        biases = scales * -(2 ** (format.bits - 1))
    if codes.size == 0:  # which mx.dequantize does not take
        dtype = dtype or (scales.dtype if format.is_affine else mx.bfloat16)
        return mx.zeros((*codes.shape[:-1], codes.shape[-1] * 32 // format.bits), dtype)
    return mx.dequantize(
        codes, scales, biases, group_size=format.group_size, bits=format.bits, mode=format.mode, dtype=dtype
    )


def quantize_parts(x: mx.array, format: Format) -> tuple[mx.array, ...]:
    """Codes, scales and, where ``format`` has them, biases of ``x``.

    ``x`` is ``[..., N, dim]``. Rows that ``format`` does not divide must have been fitted (:meth:`Format.fit`): here a
    row is only rotated, where the format says so, and padded to the next multiple of 32, with its last value, so that
    the range of its last group stays.
    """
    dim = x.shape[-1]
    if format.rotated:
        x = rotate(x)
    padded = format.fit(dim)[1]
    if padded != dim:
        x = mx.concatenate([x, mx.broadcast_to(x[..., -1:], (*x.shape[:-1], padded - dim))], axis=-1)
    if format.symmetric:
        return _quantize_symmetric(x, format)
    return tuple(mx.quantize(x, group_size=format.group_size, bits=format.bits, mode=format.mode))


def quantize(x: mx.array, format: Format | str) -> QuantizedTensor:
    """Quantize the rows of ``x``.

    Args:
        x: ``[..., N, dim]`` float16, bfloat16 or float32, with two dimensions or more.
        format: a :class:`Format`, or the name of a floating-point one. A ``dim`` that it does not divide takes the
            largest group size that fits, with rows padded to the next multiple of 32 (:meth:`Format.fit`).

    Returns:
        A :class:`QuantizedTensor` that reads as an array of ``x``'s shape and dtype.

    Raises:
        TypeError, ValueError: for another dtype, too few dimensions, or a format that MLX does not have.
    """
    if not isinstance(x, mx.array) or x.dtype not in _SCALE_DTYPES:
        given = x.dtype if isinstance(x, mx.array) else type(x).__name__
        raise TypeError(f"x is {given}: quantize takes an array of float16, bfloat16 or float32")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: quantize takes two dimensions or more")
    if isinstance(format, str):
        format = Format.named(format)
    elif not isinstance(format, Format):
        raise TypeError(f"format is {type(format).__name__}: give a Format, or one of 'mxfp4', 'mxfp8', 'nvfp4'")
    fitted, _ = format.fit(x.shape[-1])
    codes, scales, *biases = quantize_parts(x, fitted)
    return QuantizedTensor(codes, scales, biases[0] if biases else None, fitted, dim=x.shape[-1], dtype=x.dtype)


def _quantize_symmetric(x: mx.array, format: Format) -> tuple[mx.array, mx.array]:
    """Codes and scales of the symmetric affine format.

    The number of the largest magnitude in a group maps to code 0, the one code without a counterpart, so that all are
    of use; the scale is negative where that number is positive.
    """
    half = 2 ** (format.bits - 1)
    groups = x.reshape(*x.shape[:-1], -1, format.group_size).astype(mx.float32)
    peaks = mx.take_along_axis(groups, mx.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    scales = (peaks / -half).astype(x.dtype)
    step = mx.where(scales == 0, 1, scales).astype(mx.float32)
    codes = mx.clip(mx.round(groups / step) + half, 0, 2 * half - 1).astype(mx.uint32)
    return _pack(codes.reshape(x.shape), format.bits), scales.squeeze(-1)


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Pack ``[..., dim]`` uint32 codes of ``bits`` bits into a little-endian bit stream of uint32 words."""
    stream = (codes[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
    stream = stream.reshape(*codes.shape[:-1], -1, 32)
    return (stream << mx.arange(32, dtype=mx.uint32)).sum(axis=-1)
