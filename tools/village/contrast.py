"""Which heads of the village are about its taboo? Its taboo requests against its ordinary ones.

    python -m tools.village.contrast --out docs

Scans both in one run, holds them against each other, and answers both with each head off. Writes contrast.md and
contrast-village.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.results.contrast import ContrastResult
from shipsfast.scans.ships import scan
from tools.village.groups import answered

INTRO = """\
# Which heads matter more on one set of prompts than on another

Made by `python -m tools.village.contrast --out docs`.

A head that moves the answers to harmful prompts far may move all answers far: then it carries speech, not safety. On
[a real chat model](smollm2.md) one head of 270 stands far out on prompts that are entirely ordinary. So scan ordinary prompts
too, in the same template, and ask where scores are *higher on the harmful ones*:

```
shipsfast scan ./my-model harmful.csv --control ordinary.csv --out runs/both --plot heads.png   # one run for both
shipsfast contrast runs/both                      # the table again; --json, --top, --plot, --alternative, ...
shipsfast contrast runs/harmful runs/ordinary     # two scans that were made apart
```

```python
result = shipsfast.scan(model, harmful, tokenizer, template="chat", control=ordinary)
found = result.contrast()  # or shipsfast.contrast(a, b): two results, or their run folders
found.significant(q=0.05)  # [HeadScore(layer, head, score), ...], the largest difference first
found.auroc, found.q  # [layers, heads]
found.to_pandas()
found.plot("contrast.png")
```

The two must be one measurement: weights, ablation, metric, unit, heads; what differs is named, and refused. A mean ablation
takes the mean of the prompts for both. Prompts differ in more than what they ask for: choose ordinary ones of like length and
form, or it is length and form that are told apart.

## What is computed

For each head, of its scores on the P prompts of a and the Q prompts of b (formulas in `shipsfast/results/two_samples.py`):

| | |
|---|---|
| difference | mean on a less mean on b, in the unit of the score; the table goes by it |
| AUROC | how often a prompt of a has a higher score than one of b, ties half: 0.5 tells nothing apart. Cliff's delta is 2 AUROC - 1 |
| Hedges' g | the effect size: the difference in pooled standard deviations, without the bias of small samples |
| p | permutation test: the share of relabellings of the prompts that give as high an AUROC (the test of Mann and Whitney) or, \
with `--statistic difference`, as high a difference. All are tried where they are at most 99,999 (`--permutations`), else so many \
are drawn (`--seed`). `--alternative` is greater, less or two-sided; by default two-sided for metrics with a sign (`logit_diff`, projections, `log_prob_diff`), else greater |
| q | p after Benjamini and Hochberg over all heads: of the heads with q at most 0.05, at most 5 % are expected there by chance |
| in a | the head's place in the ranking of a alone |

A head is *significant* if its q is at most 0.05 **and** its difference is above the noise floors of both scans together: rounding
can be systematic, too. Heads with a marked score (`--nonfinite mark`) are left out and named. Where prompts are too few for any
p-value to reach q 0.05, where prompts are in both sets, and where the two were wrapped in different templates, a warning says so.

A contrast has no run folder: it is made of two in seconds, and is the same each time. `--json` keeps it.
"""


def run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    taboo, ordinary = (load_prompts(PROMPTS / f"{name}.csv") for name in ("taboo", "ordinary"))
    found = scan(model, taboo, tokenizer, template="chat", control=ordinary, progress=False).contrast()
    said = {}
    for layer, head, _ in found.top(found.p.size):
        off = ((layer, head),)
        true, refused = answered(model, tokenizer, taboo, off)
        said[layer, head] = true, refused, answered(model, tokenizer, ordinary, off)[0]
    title = f"The village: {len(taboo)} taboo requests (a), {len(ordinary)} ordinary ones (b)"
    found.plot(out / "contrast-village.png", title=title)
    text = [INTRO, *_example(found, said, len(taboo), len(ordinary)), ""]
    (out / "contrast.md").write_text("\n".join(text), "utf-8")


def _example(found: ContrastResult, said: dict, taboo: int, ordinary: int) -> Iterator[str]:
    """said: by head, true answers to taboo requests, refusals left, and ordinary requests answered rightly."""
    columns = (
        "rank", "head", "mean on taboo", "mean on ordinary", "difference", "AUROC", "Hedges' g", "q", "in a", "true answers",
        "refusals left", "ordinary requests right",
    )  # fmt: skip
    yield "## On the embedded model\n"
    yield (
        "The village refuses requests about taboo things. Every head is switched off (undifferentiated attention, chat "
        f"template) on {taboo} taboo requests (a) and {ordinary} ordinary ones (b); KL in nats. The last three columns are no "
        f"scores: with the head off, the model answers both greedily, and so many of the {taboo} taboo requests get a true "
        f"answer, or a refusal still, and so many of the {ordinary} ordinary ones the right answer.\n"
    )
    yield f"| {' | '.join(columns)} |"
    yield f"|---:|---|{'---:|' * (len(columns) - 2)}"
    maps = found.columns
    for head, (true, refused, right) in said.items():
        of = {name: values[head] for name, values in maps.items()}
        yield (
            f"| {of['rank']:.0f} | {head[0]}-{head[1]} | {of['mean_a']:.2g} | {of['mean_b']:.2g} | {of['difference']:.2g} | "
            f"{of['auroc']:.3f} | {of['hedges_g']:.2f} | {of['q']:.2g} | {of['rank_a']:.0f} | {true} | {refused} | {right} |"
        )
    how = "all there are" if found.exact else f"drawn, seed {found.seed}"
    yield (
        f"\n{found.found()}: {found.relabellings:,} relabellings ({how}), {found.alternative}, "
        f"{found.statistic_name}.\n"
    )
    yield "![The means on taboo and ordinary requests, and their difference](contrast-village.png)\n"
    moved = max(said, key=lambda head: maps["rank"][head] - maps["rank_a"][head])
    a, b = found.mean_a[moved], found.mean_b[moved]
    _, refused, right = said[moved]
    yield (
        f"Head {moved[0]}-{moved[1]} is number {maps['rank_a'][moved]:.0f} of {len(said)} on taboo requests alone and number "
        f"{maps['rank'][moved]:.0f} here: it moves taboo requests by {a:.2g} nats and ordinary ones by {b:.2g}. With it off, "
        f"{refused} of {taboo} refusals are left, and {ordinary - right} of {ordinary} ordinary requests are no longer answered "
        "rightly.\n"
    )
    yield (
        f"Significant is not large: with {taboo} prompts of each, heads that move taboo requests by "
        f"{np.nanmin(found.mean_a):.1g} nats are told apart as surely as the first. Read the difference first, then q."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    run(parser.parse_args().out)
