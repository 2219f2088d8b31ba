"""Plots. Sequential maps that keep their order in greyscale, axes named, units on the colour bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from .results import ShipsResult

LABELLED = 3  # heads named in the plot
CELL_INCHES = 0.32


def heatmap(result: ShipsResult, path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """Mean Ships of every head, layers x heads, in nats. Heads not scanned stay white."""
    mean = result.mean()
    layers, heads = mean.shape
    size = (min(14, max(4.8, CELL_INCHES * heads + 2.2)), min(14, max(3.4, CELL_INCHES * layers + 1.4)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(mean), cmap="cividis", aspect="auto", origin="lower", vmin=0)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    limit = np.nanmax(mean) if not np.isnan(mean).all() else 0
    for layer, head, score in result.top(LABELLED):
        axes.text(
            head, layer, f"{layer}-{head}", ha="center", va="center", fontsize=7,
            color="black" if score > 0.5 * limit else "white",
        )  # fmt: skip
    figure.colorbar(image, ax=axes, label="KL(base || head ablated), nats")
    prompts = result.kl.shape[0]
    axes.set_title(
        title
        or f"Ships, mean of {prompts} prompt{'s' * (prompts != 1)}, {result.record.get('ablation', '')}".rstrip(
            ", "
        ),
        fontsize=10,
    )
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure
