"""The results of ``qsdpa verify`` as text on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qsdpa_patch.verify.measurement import UNQUANTIZED, Result

__all__ = ["print_results"]


def print_results(results: Sequence[Result], title: str, console: Console) -> None:
    """Print a table with a column for each cache, and below it why a model did not run over one."""
    base = next(r.fidelity.perplexity for r in results if r.name == UNQUANTIZED and r.fidelity is not None)
    table = Table(title=title, title_justify="left")
    table.add_column("KV cache")
    for result in results:
        table.add_column(result.name, justify="right")
    columns = [_column(result, base) for result in results]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    console.print(table)
    console.print(
        "Same token: positions with the same most probable next token as over the unquantized cache. Cache: bytes "
        "allocated by all layers. Step: the most that one step needed above what was held before it.",
        style="dim",
    )
    for result in results:
        if result.error:
            console.print(f"{result.name} fails: {result.error}", style="yellow", markup=False, highlight=False)


def _column(result: Result, base: float) -> dict[str, str]:
    found = result.fidelity
    column = dict.fromkeys(
        ("perplexity", "increase", "same token", "mean KL (nats)", "largest KL", "cache", "step"), ""
    )
    if found is None:
        return column | {"perplexity": "fails"}
    column |= {
        "perplexity": f"{found.perplexity:.3f}",
        "cache": f"{result.cache_bytes / 2**20:.2f} MiB",
        "step": f"{result.step_bytes / 2**20:.2f} MiB",
    }
    if result.name != UNQUANTIZED:
        column |= {
            "increase": f"{100 * (found.perplexity / base - 1):+.2f} %",
            "same token": f"{found.greedy_agreement:.1%}",
            "mean KL (nats)": f"{found.mean_kl:.2g}",
            "largest KL": f"{found.max_kl:.2g}",
        }
    return column
