"""Plots. Maps that keep their order in greyscale, axes named, units on the colour bar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..text import counted, visible
from .sahara import SaharaResult
from .ships import ShipsResult, floor_name, label_of, quick_stability
from .statistics import Concentration
from .subspace import SubspaceResult

LABELLED = 3  # heads named in the map
BARS = 10  # heads beside it
BARS_INCHES = 3.2
CELL_INCHES = 0.32


def heatmap(
    result: ShipsResult | SubspaceResult, label: str, title: str, path: str | Path | None = None
) -> Figure:
    """Mean score of every head, layers x heads, and the top heads with their intervals.

    Heads not scanned stay white, those within noise get a dot.
    """
    mean = result.mean()
    width, height = _size(*mean.shape)
    figure = Figure(figsize=(width + BARS_INCHES, height), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(width, BARS_INCHES))
    weak = ~result.above_noise() & ~np.isnan(mean)
    image = _map(axes, mean, result.unit, result.signed, weak)
    for layer, head, score in result.top(LABELLED):
        _name(axes, layer, head, f"{layer}-{head}", score, image)
    figure.colorbar(image, ax=axes).set_label(_plain(label), fontsize=8)
    figure.get_layout_engine().set(wspace=0.06)
    if weak.any():
        _note(axes, f"dot: not above {floor_name(result)}")
    _marks(axes, result)
    _bars(bars, result, label)
    ablation = result.record.get("ablation")
    figure.suptitle(_plain(f"{title}\nablation: {ablation}" if ablation else title), fontsize=10)
    return _saved(figure, path)


def _bars(axes, result: ShipsResult | SubspaceResult, label: str) -> None:
    """The top heads with bootstrap intervals, where they are known, and how much of the total they carry."""
    top = result.top(BARS)
    stability, _ = quick_stability(result, BARS)
    if result.is_rate:
        low, high = np.array([result.rate_interval(s.layer, s.head) for s in top]).T
    at = tuple(zip(*((s.layer, s.head) for s in top), strict=True))
    error = None
    if stability is not None:
        scores = np.array([s.score for s in top])
        # BCa intervals of skewed scores may lie beside the score
        error = np.maximum([scores - stability.low[at], stability.high[at] - scores], 0)
    if result.is_rate:
        scores = np.array([s.score for s in top])
        error = np.maximum([scores - low, high - scores], 0)
    names = [f"{s.layer}-{s.head}" for s in top]
    axes.barh(
        names, [s.score for s in top], xerr=error, color="#5c6b8a", ecolor="black", capsize=2, height=0.7
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(_plain(label), fontsize=7)
    title = _share(result.concentration())
    if result.is_rate:
        title += f"\n95% Wilson intervals, {counted(result.scores.shape[0], 'prompt')}"
    elif error is not None:
        title += f"\n{stability.confidence:.0%} intervals, {counted(stability.prompts, 'prompt')} resampled"
    axes.set_title(title, fontsize=8)


def side_by_side(results: dict[str, ShipsResult], path: str | Path | None = None) -> Figure:
    """Maps of several scans of one model, each on a scale of its own, by their titles."""
    width, height = _size(*next(iter(results.values())).mean().shape)
    figure = Figure(figsize=(width * len(results), height), layout="constrained")
    for axes, (title, result) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        mean = result.mean()
        weak = ~result.above_noise() & ~np.isnan(mean)
        image = _map(axes, mean, result.unit, result.signed, weak)
        for layer, head, score in result.top(LABELLED):
            _name(axes, layer, head, f"{layer}-{head}", score, image)
        figure.colorbar(image, ax=axes).set_label(_plain(label_of(result.metric)), fontsize=8)
        if weak.any():
            _note(axes, f"dot: not above {floor_name(result)}")
        _marks(axes, result)
        axes.set_title(_plain(title), fontsize=9)
    return _saved(figure, path)


def steps(
    result: SaharaResult, label: str, title: str | None = None, path: str | Path | None = None
) -> Figure:
    """The scores of every step side by side on one scale, with the heads chosen so far."""
    count, layers, heads = result.angle_deg.shape
    width, height = _size(layers, heads)
    figure = Figure(figsize=(min(18, (width - 1.2) * count + 1.2), height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    top = float(np.nanmax(result.angle_deg))
    weak = ~result.above_noise() & ~np.isnan(result.angle_deg)
    for step, axes in enumerate(panels):
        image = _map(axes, result.angle_deg[step], result.unit, False, weak[step], top)
        for earlier in result.heads[:step]:
            axes.plot(earlier[1], earlier[0], marker="x", color="black", markersize=5)
        layer, head = result.heads[step]
        _name(axes, layer, head, f"{layer}-{head}", result.angle_deg[step, layer, head], image)
        axes.set_title(
            f"step {step + 1}: {result.scores[step]:.5g}°{_firm(result, step)}\n{_share(result.concentration(step))}",
            fontsize=9,
        )
        if step:
            axes.set_ylabel("")
    figure.colorbar(image, ax=panels, label=label)
    if weak.any():
        _note(panels[-1], "dot: gain not above the noise floor")
    figure.suptitle(
        _plain(title or f"Sahara, ablation: {result.record.get('ablation', '')} (x: chosen before)"),
        fontsize=10,
    )
    return _saved(figure, path)


def _share(found: Concentration) -> str:
    share = found.top_share[LABELLED]
    return "" if np.isnan(share) else f"top {LABELLED} carry {share:.0%}"


def _firm(result: SaharaResult, step: int) -> str:
    """How often resampled prompts choose the same head, where that is known."""
    stability, _ = quick_stability(result, 1, step)
    if stability is None:
        return ""
    return f"\nchosen in {stability.top_k_frequency[result.heads[step]]:.0%} of resamples"


def _size(layers: int, heads: int) -> tuple[float, float]:
    return min(14, max(4.8, CELL_INCHES * heads + 2.2)), min(14, max(3.4, CELL_INCHES * layers + 1.4))


def _map(
    axes, scores: np.ndarray, unit: str, signed: bool, weak: np.ndarray | None, top: float | None = None
):
    limit = top or (float(np.nanmax(np.abs(scores))) if not np.isnan(scores).all() else 0.0) or 1.0
    colours = {"cmap": "PuOr", "vmin": -limit} if signed else {"cmap": "cividis", "vmin": 0}
    image = axes.imshow(np.ma.masked_invalid(scores), aspect="auto", origin="lower", vmax=limit, **colours)
    axes.set_xlabel("head" if unit == "head" else "key/value group")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if weak is not None and weak.any():
        layer, head = np.nonzero(weak)
        axes.scatter(head, layer, s=3, color="black" if signed else "white", linewidths=0)
    return image


def _marks(axes, result) -> None:
    """Crosses on heads with scores that are not finite: they have no mean."""
    heads = getattr(result, "marked_heads", [])
    if heads:
        layer, head = zip(*heads, strict=True)
        axes.scatter(head, layer, s=14, marker="x", color="#b3261e", linewidths=1)
        _note(axes, f"x: {result.marks()['count']:,} scores not finite", line=1)


def _name(axes, layer: int, head: int, text: str, score: float, image) -> None:
    """Text on a cell, dark on light or light on dark."""
    red, green, blue, _ = image.cmap(image.norm(score))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
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
