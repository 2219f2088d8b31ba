"""Plots of scores and ranks against what was turned up. They take what they draw, and know no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .plots import _plain, _saved

LINES = ("-", "--", "-.", ":")
MARKS = "osD^v<>Pp*hX"


def against_dose(
    scales: np.ndarray,
    scores: Mapping[tuple[int, int], np.ndarray],
    ranks: Mapping[tuple[int, int], np.ndarray],
    alike: Sequence[float],
    label: str,
    heads: int,
    title: str,
    path: str | Path | None = None,
) -> Figure:
    """Scores and ranks of some heads, [E] each, against E ascending scales. alike: Spearman's correlation over all `heads`
    between each scale and the next."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Evenly spaced, whatever the scales are: 0 has no place on a logarithmic axis.
    places = np.arange(len(scales))
    for number, at in enumerate(scores):
        style = {
            "linestyle": LINES[number % len(LINES)], "marker": MARKS[number % len(MARKS)], "markersize": 4,
            "color": f"{0.65 * (number % 5) / 4:.2f}" if number >= 10 else f"C{number % 10}", "linewidth": 1.2,
        }  # fmt: skip
        left.plot(places, scores[at], label=f"{at[0]}-{at[1]}", **style)
        right.plot(places, ranks[at], **style)
    for axes in (left, right):
        axes.set_xticks(places, [f"{scale:g}" for scale in scales], fontsize=8)
        axes.set_xlabel("eps")
    left.set_ylabel(_plain(f"mean {label}"), fontsize=8)
    right.set_ylabel(f"rank among {heads:,} heads", fontsize=8)
    right.set_yscale("log")
    right.set_ylim(heads * 1.2, 0.8)
    ticks = [10**power for power in range(int(np.log10(heads)) + 1)]
    right.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    for number, rho in enumerate(alike):
        text = "" if np.isnan(rho) else f"{rho:.2f}"
        right.annotate(
            text,
            (number + 0.5, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    right.set_title("Spearman between neighbouring eps, all heads:", fontsize=8, pad=14)
    figure.legend(loc="outside right center", fontsize=7, title="layer-head", title_fontsize=7)
    figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)
