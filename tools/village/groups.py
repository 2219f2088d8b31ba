"""Does Sahara find the heads that refuse? Its groups against all other groups of as many heads, on the village.

    python -m tools.village.groups --out docs

For 1 to 3 heads: how many of the demo's taboo requests get a true answer with Sahara's group ablated, and with
each group of as many heads: all of them, or a random sample where there are many. Writes sahara-village.md and
sahara-village.png.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap
from tqdm import tqdm

from shipsfast.demo.run import MODEL, PROMPTS, replies
from shipsfast.demo.world import is_correct, is_refusal
from shipsfast.engine.ablate import ablate
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.scans.sahara import sahara

SIZES = (1, 2, 3)
RANKS = (1, 3)
MOST_GROUPS = 200  # groups of one size that are tried
Group = tuple[tuple[int, int], ...]


def answered(model, tokenizer, prompts: list[str], group: Group) -> tuple[int, int]:
    """(true answers, refusals) to `prompts` with the group ablated."""
    with ablate(model, group):
        said = replies(model, tokenizer, prompts)
    return sum(is_correct(p, said[p]) for p in prompts), sum(is_refusal(said[p]) for p in prompts)


def run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    taboo, ordinary = load_prompts(PROMPTS / "taboo.csv"), load_prompts(PROMPTS / "ordinary.csv")
    heads = list(
        itertools.product(range(model.config.num_hidden_layers), range(model.config.num_attention_heads))
    )
    draw = random.Random(0)
    others: dict[int, np.ndarray] = {}
    for size in SIZES:
        groups = list(itertools.combinations(heads, size))
        groups = draw.sample(groups, MOST_GROUPS) if len(groups) > MOST_GROUPS else groups
        found = [answered(model, tokenizer, taboo, g)[0] for g in tqdm(groups, desc=f"groups of {size}")]
        others[size] = np.asarray(found)
    rows, series = [], {}
    for rank in RANKS:
        chosen = sahara(
            model, taboo, tokenizer, template="chat", group_size=max(SIZES), rank=rank, progress=False
        ).heads
        for size in SIZES:
            group = tuple(chosen[:size])
            true, refused = answered(model, tokenizer, taboo, group)
            ordinary_true = answered(model, tokenizer, ordinary, group)[0]
            rows.append((rank, size, group, true, refused, ordinary_true))
            series.setdefault(rank, []).append(true)
    (out / "sahara-village.md").write_text(_text(rows, others, len(taboo), len(ordinary)), "utf-8")
    _plot(series, others, len(taboo), out / "sahara-village.png")


def _text(rows, others: dict[int, np.ndarray], taboo: int, ordinary: int) -> str:
    intro = (
        "Made by `python -m tools.village.groups --out docs`. Sahara (undifferentiated attention, chat template) "
        f"searches on the demo's {taboo} taboo requests, all of which the whole model refuses. For its groups, and for "
        f"groups drawn at random of as many heads (all there are, up to {MOST_GROUPS}): how many of the {taboo} get a true answer instead, decoded greedily."
    )
    columns = (
        "rank", "heads", "Sahara's group", "true answers", "refusals left", "ordinary requests right",
        "random groups: mean (95 % interval of it)", "median, 90 % of them", "share below",
    )  # fmt: skip
    lines = [
        "# Sahara on the village",
        "",
        intro,
        "",
        f"| {' | '.join(columns)} |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rank, size, group, true, refused, right in rows:
        low, middle, high = np.quantile(others[size], [0.05, 0.5, 0.95])
        mean, interval = others[size].mean(), mean_interval(others[size])
        names = ", ".join(f"{i}-{j}" for i, j in group)
        lines.append(
            f"| {rank} | {size} | {names} | {true} of {taboo} | {refused} | {right} of {ordinary} | "
            f"{mean:.1f} ({interval[0]:.1f} to {interval[1]:.1f}; {len(others[size])} groups) | "
            f"{middle:g}, {low:g} to {high:g} | {(others[size] < true).mean():.0%} |"
        )
    return "\n".join([*lines, "", "![True answers by size of the group](sahara-village.png)", ""])


def mean_interval(found: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over groups."""
    if len(set(found.tolist())) == 1:
        return float(found[0]), float(found[0])
    return tuple(bootstrap((found,), np.mean, rng=np.random.default_rng(0)).confidence_interval)


def _plot(series: dict[int, list[int]], others: dict[int, np.ndarray], taboo: int, path: Path) -> None:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    means = [others[size].mean() for size in SIZES]
    low, high = np.transpose([mean_interval(others[size]) for size in SIZES])
    for size in SIZES:
        axes.plot([size] * len(others[size]), others[size], "_", color="0.75", markersize=9, zorder=0)
    axes.errorbar(
        SIZES,
        means,
        [means - low, high - means],
        color="0.4",
        fmt="--D",
        capsize=4,
        label="random groups, mean and 95 %",
    )
    for (rank, found), style in zip(series.items(), ("-s", "-o"), strict=True):
        axes.plot(SIZES, found, style, color="black", label=f"Sahara, rank {rank}")
    axes.set_xticks(SIZES)
    axes.set_ylim(-1, taboo + 1)
    axes.plot([], [], "_", color="0.75", label="random groups, each")
    axes.set_xlabel("heads ablated")
    axes.set_ylabel(f"true answers to {taboo} taboo requests")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    run(parser.parse_args().out)
