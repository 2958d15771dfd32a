"""The demo's results as text on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qsdpa_patch.demo.comparison import CacheResult, Comparison

__all__ = ["print_comparison"]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the generated texts, the table of measurements and the report."""
    for result in comparison.results:
        text = Text(result.generation.text.strip())
        console.print(Panel(text, title=f"{_name(result)} cache", title_align="left"))
    console.print(_table(comparison))
    positions = comparison.results[0].fidelity.positions
    console.print(
        f"Greedy decoding; activations in {comparison.dtype}. The last four rows: distributions of the next token at "
        f"{positions} positions of a fixed text, with caches quantized from the first token on. Memory: allocated for "
        "that text.",
        style="dim",
    )
    console.print("\nWhere attention over the caches went, qsdpa_patch.report():")
    console.print(str(comparison.report), highlight=False, markup=False, soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    """One column for each cache."""
    results = comparison.results
    columns = [_column(result, len(results[0].generation.tokens)) for result in results]
    table = Table(title="Against the unquantized cache", title_justify="left")
    table.add_column("KV cache")
    for result in results:
        table.add_column(_name(result), justify="right")
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def _column(result: CacheResult, wanted: int) -> dict[str, str]:
    fidelity = result.fidelity
    column = {
        "generation, tokens per second": f"{result.generation.tokens_per_second:.1f}",
        "memory": f"{result.cache_bytes / 2**20:.2f} MiB",
        "memory, of a float16 cache": f"{result.cache_bytes / result.float16_bytes:.1%}",
        "tokens before the text differs": f"{result.same_tokens} of {wanted}",
        "same most probable next token": f"{fidelity.greedy_agreement:.1%}",
        "KL divergence, mean (nats)": f"{fidelity.mean_kl:.2g}",
        "KL divergence, largest": f"{fidelity.max_kl:.2g}",
        "perplexity": f"{fidelity.perplexity:.3f}",
    }
    if result.bits is None:  # compared with itself
        column |= dict.fromkeys(list(column)[3:7], "")
    return column


def _name(result: CacheResult) -> str:
    return "unquantized" if result.bits is None else f"{result.bits}-bit"
