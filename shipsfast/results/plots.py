"""Plots. Maps that keep their order in greyscale, axes named, units on the colour bar.

They take what they draw, and know no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import FuncNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..text import visible

BARS_INCHES = 3.2
ACROSS = 4  # small maps side by side
CELL_INCHES = 0.32
STANDS_OUT = 4  # times as much as nearly all heads


@dataclass(frozen=True)
class Panel:
    """One map of heads.

    values: [L, H], NaN for heads not scanned, which stay white; unit: "head" or "kv_group"; label: of the colour bar;
    weak: bool [L, H], heads within noise, which get a dot; named: (layer, head, score) written on the map; chosen: heads
    that get a cross; marked: heads without a mean, which get a red one.
    """

    values: np.ndarray
    unit: str
    label: str
    weak: np.ndarray
    weak_note: str
    named: Sequence[tuple[int, int, float]]
    title: str = ""
    signed: bool = False
    chosen: Sequence[tuple[int, int]] = ()
    marked: Sequence[tuple[int, int]] = ()
    marked_note: str = ""


@dataclass(frozen=True)
class Bars:
    """The top heads, (layer, head, score), with intervals where they are known."""

    top: Sequence[tuple[int, int, float]]
    label: str
    title: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def heatmap(panel: Panel, bars: Bars, title: str, path: str | Path | None = None) -> Figure:
    """Mean score of every head, layers x heads, and the top heads beside it."""
    width, height = _size(*panel.values.shape)
    figure = Figure(figsize=(width + BARS_INCHES, height), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(width, BARS_INCHES))
    _map_with_bar(figure, axes, panel)
    figure.get_layout_engine().set(wspace=0.06)
    _bars(beside, bars)
    figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)


def side_by_side(panels: Sequence[Panel], path: str | Path | None = None, *, title: str = "") -> Figure:
    """Maps of several scans of one model, each on a scale of its own."""
    width, height = _size(*panels[0].values.shape)
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _map_with_bar(figure, axes, panel)
        axes.set_title(_plain(panel.title), fontsize=9)
    if title:
        figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)


def steps(rows: Sequence[Sequence[Panel]], title: str, path: str | Path | None = None) -> Figure:
    """The scores of every step of a search side by side, on one scale; one row for each kind of score."""
    width, height = _size(*rows[0][0].values.shape)
    count = len(rows[0])
    figure = Figure(figsize=(min(18, (width - 1.2) * count + 1.2), height * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False, sharey=True)
    for places, panels in zip(grid, rows, strict=True):
        scale = Normalize(0, max(float(np.nanmax(panel.values)) for panel in panels) or 1.0)
        for number, (axes, panel) in enumerate(zip(places, panels, strict=True)):
            image = _map(axes, panel, scale)
            axes.set_title(panel.title, fontsize=9)
            if number:
                axes.set_ylabel("")
        figure.colorbar(image, ax=places, label=panels[0].label)
        if any(panel.weak.any() for panel in panels):
            _note(places[-1], panels[0].weak_note)
    figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)


def small_multiples(panels: Sequence[Panel], title: str, path: str | Path | None = None) -> Figure:
    """Maps of the same heads and the same thing, in rows, on one scale."""
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    width, height = _size(*panels[0].values.shape)
    width, height = width - 1.2, height - 0.4
    smaller = min(1, 16.8 / (width * across))
    high = min(7, max(2.4, smaller * height))
    figure = Figure(figsize=(smaller * width * across + 1.2, high * down + 0.8), layout="constrained")
    places = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    norm = _norm(np.stack([panel.values for panel in panels]), panels[0].signed)
    for number, (axes, panel) in enumerate(zip(places.flat, panels, strict=False)):
        image = _map(axes, panel, norm)
        axes.set_title(_plain(panel.title), fontsize=9)
        axes.label_outer()
        if number + across >= len(panels):  # nothing is below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(_heads(panel))
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=places, aspect=25 * down)
    bar.set_label(_plain(panels[0].label + _said(norm)), fontsize=8)
    if any(panel.weak.any() for panel in panels):
        _note(places[-1, (len(panels) - 1) % across], panels[0].weak_note)
    figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)


def by_token(
    scores: np.ndarray, heads: Sequence[str], tokens: Sequence[str], label: str, title: str, signed: bool,
    path: str | Path | None = None,
) -> Figure:  # fmt: skip
    """Scores [heads, tokens] of one prompt, in the order in which they are given."""
    count, length = scores.shape
    figure = Figure(figsize=(min(18, 0.42 * length + 2.4), 0.26 * count + 1.6), layout="constrained")
    axes = figure.subplots()
    norm = _norm(scores, signed)
    image = axes.imshow(scores, aspect="auto", norm=norm, cmap="PuOr" if signed else "cividis")
    axes.set_yticks(range(count), heads, fontsize=7)
    axes.set_xticks(range(length), [_plain(token) for token in tokens], fontsize=7, rotation=60, ha="right")
    axes.set_ylabel("layer-head")
    axes.set_xlabel("token")
    _bar(figure, image, axes, label)
    axes.set_title(_plain(title), fontsize=9)
    return _saved(figure, path)


def contrast_maps(
    first: Panel, second: Panel, difference: Panel, title: str, path: str | Path | None = None
) -> Figure:
    """Two maps on one scale, and their difference on its own, beside each other."""
    width, height = _size(*first.values.shape)
    figure = Figure(figsize=(min(21, 3 * width), height + 0.3), layout="constrained")
    places = figure.subplots(1, 3, sharey=True)
    norm = _norm(np.stack([first.values, second.values]), first.signed)
    for axes, panel in zip(places, (first, second), strict=False):
        image = _map(axes, panel, norm)
        if panel.weak.any():
            _note(axes, panel.weak_note)
    _bar(figure, image, places[:2], first.label)
    _bar(figure, _map(places[2], difference, _around_zero(difference.values)), places[2], difference.label)
    if difference.weak.any():
        _note(places[2], difference.weak_note)
    for axes, panel in zip(places, (first, second, difference), strict=True):
        axes.set_title(_plain(panel.title), fontsize=9)
        if axes is not places[0]:
            axes.set_ylabel("")
    figure.suptitle(_plain(title), fontsize=10)
    return _saved(figure, path)


def _map_with_bar(figure: Figure, axes, panel: Panel) -> None:
    _bar(figure, _map(axes, panel), axes, panel.label)
    if panel.weak.any():
        _note(axes, panel.weak_note)


def _bar(figure: Figure, image, places, label: str) -> None:
    figure.colorbar(image, ax=places).set_label(_plain(label + _said(image.norm)), fontsize=8)


def _bars(axes, bars: Bars) -> None:
    scores, error = np.array([score for _, _, score in bars.top]), None
    if bars.low is not None:
        # BCa intervals of skewed scores may lie beside the score
        error = np.maximum([scores - bars.low, bars.high - scores], 0)
    names = [f"{layer}-{head}" for layer, head, _ in bars.top]
    axes.barh(names, scores, xerr=error, color="#5c6b8a", ecolor="black", capsize=2, height=0.7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(_plain(bars.label), fontsize=7)
    axes.set_title(bars.title, fontsize=8)


def _size(layers: int, heads: int) -> tuple[float, float]:
    return min(14, max(4.8, CELL_INCHES * heads + 2.2)), min(14, max(3.4, CELL_INCHES * layers + 1.4))


def _norm(scores: np.ndarray, signed: bool) -> Normalize:
    """The scale of the colours of all these scores, up to the largest."""
    limit = _largest(scores)
    if not signed and limit > STANDS_OUT * np.nanquantile(scores, 0.98):
        return PowerNorm(0.5, 0, limit)  # or one head would leave all others one colour
    return Normalize(-limit if signed else 0, limit)


def _said(norm: Normalize) -> str:
    """What the label of a colour bar says of its scale."""
    return ", square-root scale" if isinstance(norm, (PowerNorm, FuncNorm)) else ""


def _heads(panel: Panel) -> str:
    return "head" if panel.unit == "head" else "key/value group"


def _around_zero(differences: np.ndarray) -> Normalize:
    """The same of differences, where small ones count beside large ones on either side of zero."""
    limit = _largest(differences)
    if limit <= STANDS_OUT * np.nanquantile(np.abs(differences), 0.98):
        return Normalize(-limit, limit)
    roots = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2)
    return FuncNorm(roots, -limit, limit)


def _largest(scores: np.ndarray) -> float:
    return (float(np.nanmax(np.abs(scores))) if not np.isnan(scores).all() else 0.0) or 1.0


def _map(axes, panel: Panel, norm: Normalize | None = None):
    """One map, with its dots, crosses and names. norm: the scale of the colours, default its own."""
    scores, signed = panel.values, panel.signed
    image = axes.imshow(
        np.ma.masked_invalid(scores),
        aspect="auto",
        origin="lower",
        norm=norm or _norm(scores, signed),
        cmap="PuOr" if signed else "cividis",
    )
    axes.set_xlabel(_heads(panel))
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.weak.any():
        layer, head = np.nonzero(panel.weak)
        axes.scatter(head, layer, s=3, color="black" if signed else "white", linewidths=0)
    for layer, head in panel.chosen:
        axes.plot(head, layer, marker="x", color="black", markersize=5)
    for layer, head, score in panel.named:
        _name(axes, layer, head, score, image)
    if panel.marked:  # scores that are not finite: these heads have no mean
        layer, head = zip(*panel.marked, strict=True)
        axes.scatter(head, layer, s=14, marker="x", color="#b3261e", linewidths=1)
        _note(axes, panel.marked_note, line=1)
    return image


def _name(axes, layer: int, head: int, score: float, image) -> None:
    """The head's name on its cell, dark on light or light on dark."""
    red, green, blue, _ = image.cmap(image.norm(score))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = f"{layer}-{head}"
    axes.text(head, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _plain(text: str) -> str:
    """Names of models and metrics are no mathematics, whatever dollars they have."""
    return visible(text).replace("$", r"\$")


def _note(axes, text: str, line: int = 0) -> None:
    axes.annotate(
        _plain(text),
        (1, 0),
        (0, -34 - 9 * line),  # below the name of the axis
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7,
    )


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure
