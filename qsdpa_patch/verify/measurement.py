"""One text through one model over several caches at once: how far each is from the unquantized one, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import qsdpa_patch
from qsdpa_patch.demo.fidelity import FUSED_ROWS, Fidelity, Tally, log_probabilities, quantized_prompt_cache
from qsdpa_patch.report import Report

__all__ = ["FUSED", "OPS", "STOCK", "UNQUANTIZED", "Options", "Result", "verify"]

UNQUANTIZED = "unquantized"
STOCK = "mlx-lm"
FUSED = "qsdpa_patch"
OPS = "with plain ops"


@dataclass(frozen=True)
class Options:
    """What the caches are quantized to.

    bits, group_size: as mlx-lm's ``--kv-bits`` and ``--kv-group-size``.
    key_bits, value_bits, rotate, kernels: as :func:`qsdpa_patch.enable` takes them. mlx-lm's own cache has none.
    """

    bits: int = 4
    group_size: int = 64
    key_bits: int | str | None = None
    value_bits: int | str | None = None
    rotate: bool | str = False
    kernels: str = "auto"


@dataclass(frozen=True)
class Result:
    """One cache over the whole text.

    fidelity: against the unquantized cache; ``None`` where the model does not run over this cache, for ``error``.
    cache_bytes: allocated at the end, by all layers.
    step_bytes: the most that one step needed above what was held before it: activations, attention, new rows.
    """

    name: str
    fidelity: Fidelity | None
    cache_bytes: int
    step_bytes: int
    error: str = ""


@dataclass
class _Run:
    """A cache on its way through the text. ``patch`` gives the context that its steps run in."""

    name: str
    make: Callable[[], list[Any]]
    patch: Callable[[], AbstractContextManager[None]]
    cache: list[Any] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    step_bytes: int = 0
    error: str = ""

    def start(self) -> None:
        with self._guarded(), self.patch():
            self.cache = self.make()

    def step(self, model: Any, fed: Sequence[int]) -> mx.array | None:
        """Log-probabilities ``[len(fed), vocabulary]``, or ``None`` after a failure."""
        found = None
        if not self.error:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            with self._guarded(), self.patch():
                found = log_probabilities(model, fed, self.cache)
            self.step_bytes = max(self.step_bytes, mx.get_peak_memory() - before)
        return found

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keep what goes wrong over a quantized cache as the outcome of this run; over the plain one it is raised."""
        try:
            yield
        except Exception as error:
            if self.name == UNQUANTIZED:
                raise
            self.error = f"{type(error).__name__}: {error}"
            self.cache = []

    def result(self, positions: int) -> Result:
        if self.error:
            return Result(self.name, None, 0, 0, self.error)
        size = sum(layer.nbytes for layer in self.cache)
        return Result(self.name, self.tally.result(positions), size, self.step_bytes)


def verify(
    model: Any,
    tokens: Sequence[int],
    options: Options,
    *,
    chunk: int = FUSED_ROWS,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Result], Report]:
    """Feed ``tokens`` to ``model`` over an unquantized cache, mlx-lm's quantized one, and those of this package.

    All are quantized from the first token on and advance together, ``chunk`` tokens at a time. The patch must be off;
    it is on for the steps over caches of this package alone.

    Args:
        model: as :func:`mlx_lm.load` gives it.
        tokens: two or more.
        chunk: of up to 16, attention goes to the fused kernels; of more, to the route for prompts.
        progress: called with the number of tokens done.

    Returns:
        The results, the unquantized cache first, and where attention over this package's caches went.

    Raises:
        ValueError: too few tokens, bad options, or the patch is on.
    """
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: perplexity takes two or more")
    if qsdpa_patch.is_enabled():
        raise ValueError("the patch is on: disable() it, so that mlx-lm's own cache can be measured")
    with _patched(options, options.kernels):  # raises for options that are not taken, before any work
        qsdpa_patch.reset_report()
    runs = _runs(model, options)
    for run in runs:
        run.start()
    for start in range(0, len(tokens), chunk):
        fed, following = tokens[start : start + chunk], tokens[start + 1 : start + chunk + 1]
        wanted = None
        for run in runs:
            found = run.step(model, fed)
            wanted = found if wanted is None else wanted
            if found is not None and wanted is not None:
                run.tally.add(wanted, found, following)
        progress(min(start + chunk, len(tokens)))
    return [run.result(len(tokens)) for run in runs], qsdpa_patch.report()


def _runs(model: Any, options: Options) -> list[_Run]:
    def quantized() -> list[Any]:
        return quantized_prompt_cache(model, options.bits, options.group_size)

    runs = [
        _Run(UNQUANTIZED, lambda: make_prompt_cache(model), nullcontext),
        _Run(STOCK, quantized, nullcontext),
        _Run(FUSED, quantized, lambda: _patched(options, options.kernels)),
    ]
    if options.kernels != "ops":
        runs.append(_Run(OPS, quantized, lambda: _patched(options, "ops")))
    return runs


def _patched(options: Options, kernels: str) -> AbstractContextManager[None]:
    return qsdpa_patch.enabled(
        key_bits=options.key_bits, value_bits=options.value_bits, rotate=options.rotate, kernels=kernels
    )
