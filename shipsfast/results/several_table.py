"""Several ablations side by side, as a person reads them in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from ..text import visible
from .several import Several
from .tables import _grid, _say, show_ships

if TYPE_CHECKING:
    from .ships import ShipsResult

FEW = 3  # ablations of which each gets its own table, and each pair a line


def show_several(result: ShipsResult, top: int, console: Console) -> None:
    """The ablations' own tables, of many the first one's, and then the comparison, of further metrics too."""
    own = list(result.by_ablation.items())
    for _, each in own if len(own) <= FEW else own[:1]:
        show_ships(each, top, console)
        console.print()
    for one in (result, *result.also.values()):
        _say(
            console,
            f"{len(own)} ablations compared: {one.metric['label']}; ranks{', and mean scores' * (len(own) <= FEW)}",
        )
        _compare(one, Several(one.by_ablation, result.sink_mass), top, console)
    if len(own) > FEW:
        _say(console, "every ablation's own table, and every pair: --json, .by_ablation, .agreement()")


def _compare(result: ShipsResult, several: Several, top: int, console: Console) -> None:
    if not several.heads:
        return _say(console, "no head has a score by every ablation: there is nothing to compare")
    _ranks(several, top, console)
    if several.sinks is not None:
        _say(
            console,
            "sink: the unablated head's mean attention weight on the first token; varies: how far its output is from being the "
            "same everywhere, of its size",
        )
    pairs = several.agreement(top)
    if len(several.names) > FEW:
        pairs = [pair for dose in result.doses.values() for pair in dose.neighbours(top)]
    for each in pairs:
        alike = "not defined" if np.isnan(each.spearman) else f"{each.spearman:.3g}"
        _say(
            console,
            f"{several.short[each.first]} and {several.short[each.second]}: Spearman {alike} over {each.heads:,} "
            f"{several.unit}s; {each.overlap:.0%} of the top {each.k} in common ({each.chance:.0%} by chance)",
        )
    for line in several.lines(top):
        _say(console, line)


def _ranks(several: Several, top: int, console: Console) -> None:
    ranks, marked = several.ranks, {(each.layer, each.head) for each in several.only_one(top)}
    sinks = several.sinks
    columns = [visible(several.short[name]) for name in several.names]
    table = _grid(f"layer-{several.unit}", *columns, *["sink", "varies"] * (sinks is not None))
    for column in table.columns[1:]:
        column.no_wrap, column.overflow = False, "fold"
    for at in several.top(top):
        row = [f"{at[0]}-{at[1]}{' *' * (at in marked)}"]
        for name in several.names:
            score = f" ({several.means[name][at]:.2g})" if len(several.names) <= FEW else ""
            row.append(f"{ranks[name][at]:.0f}{score}")
        if sinks is not None:
            row += [f"{sinks.first_token[at]:.3f}", f"{sinks.varies[at]:.2g}"]
        table.add_row(*map(Text, row))
    console.print(table)
