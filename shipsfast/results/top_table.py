"""A search for the top heads, as a person reads it in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..text import counted, visible
from .tables import _error, _grid, _say, _weak, marks

if TYPE_CHECKING:
    from .top_heads import TopHeads


def show_top(result: TopHeads, top: int, console: Console | None = None) -> None:
    """The heads, and how sure it is that there are no others."""
    console = console or Console(highlight=False)
    metric, sure = result.metric, result.certificate
    unit = f", {metric['unit']}" if metric["unit"] else ""
    _say(
        console,
        f"Top {sure.k} of {counted(sure.heads, result.unit)}: {metric['label']}, {result.record.get('ablation', '')}",
    )
    several = len(result.per_prompt) > 1
    table = _grid("rank", f"layer-{result.unit}", visible(f"mean{unit}"), *["95% interval"] * several)
    ends = result.intervals() if several and result.heads else ()
    for rank, (layer, head, value) in enumerate(result.top(top), 1):
        row = [str(rank), f"{layer}-{head}", f"{value:.6g}{_weak(result, layer, head)}"]
        row += [" to ".join(f"{end[layer, head]:.3g}" for end in ends)] * several
        table.add_row(*map(Text, row))
    console.print(table)
    for line in (*sure.lines(), *marks(result)):
        _say(console, line)
    _say(console, f"noise floor {result.noise_floor:.2g}{unit.replace(',', '')}")
    _error(result, metric["unit"], console)
