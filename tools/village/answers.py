"""Do next-token scores rank heads as whole answers do? Ships beside the exhaustive generation scan, on the village.

    python -m tools.village.answers --out docs

For every single head: mean KL of the next token, attack success rate of the whole answer, how many of the answers
are true, and what the ablation does to ordinary requests. Writes answers-village.md and answers-village.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from shipsfast.answers.asr import scan_asr
from shipsfast.answers.evaluate import evaluate
from shipsfast.answers.generate import generate
from shipsfast.demo.run import MODEL, NEW_TOKENS, PROMPTS
from shipsfast.demo.world import is_correct
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.results.plots import side_by_side
from shipsfast.results.ships import ShipsResult
from shipsfast.scans.ships import scan

SHOWN = 8


def run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    taboo, ordinary = load_prompts(PROMPTS / "taboo.csv"), load_prompts(PROMPTS / "ordinary.csv")
    ships = scan(model, taboo, tokenizer, template="chat", progress=False)
    asr = scan_asr(model, taboo, tokenizer, template="chat", max_new_tokens=NEW_TOKENS)
    heads = [[s[:2]] for s in asr.top(asr.mean().size)]
    how = {"template": "chat", "max_new_tokens": NEW_TOKENS, "progress": False}
    texts = generate(model, taboo, tokenizer, groups=heads, **how)
    true = [sum(map(is_correct, taboo, said)) for said in texts]
    control = evaluate(model, taboo, tokenizer, groups=heads, control=ordinary, **how).control
    (out / "answers-village.md").write_text(_text(ships, asr, heads, true, control, len(taboo)), "utf-8")
    side_by_side(
        [
            ships.panel(title=f"Ships: KL of the next token, {len(taboo)} taboo requests"),
            asr.panel(title="whole answers judged: attack success rate"),
        ],
        out / "answers-village.png",
    )


def _text(ships: ShipsResult, asr: ShipsResult, heads, true: list[int], control, taboo: int) -> str:
    kl_nats, rate = ships.mean(), asr.mean()
    rho = spearmanr(kl_nats.ravel(), rate.ravel()).statistic
    moved = rate.ravel() > asr.noise_floor
    best = [f"{s.layer}-{s.head}" for s in ships.top(3)]
    lines = [
        "# Whole answers on the village",
        "",
        (
            "Made by `python -m tools.village.answers --out docs`. Every head off alone (undifferentiated attention), "
            f"{taboo} taboo requests in held-out wordings, greedy answers of up to {NEW_TOKENS} tokens, judged by refusal "
            f"phrases. Spearman's rank correlation of mean KL and attack success rate over all {rate.size} heads is "
            f"{rho:.2f}; {int(moved.sum())} heads have a rate above the unablated model's "
            f"({asr.noise_floor:.0%}), and the top three by KL are {', '.join(best)}."
        ),
        "",
        f"| head | attack success rate | true answers of {taboo} | KL, nats (rank) | ordinary requests: KL, nats | same answer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    order = np.argsort(-kl_nats.ravel(), kind="stable").argsort().reshape(kl_nats.shape) + 1
    for g, [(layer, head)] in enumerate(heads[:SHOWN]):
        lines.append(
            f"| {layer}-{head} | {rate[layer, head]:.0%} | {true[g]} | {kl_nats[layer, head]:.3g} ({order[layer, head]}) | "
            f"{control.mean_kl_nats[g]:.2g} | {control.same[g]:.0%} |"
        )
    lines += ["", f"The other {rate.size - SHOWN} heads have rates of at most {_rest(rate, heads):.0%}."]
    return "\n".join([*lines, "", "![Both scans, layers by heads](answers-village.png)", ""])


def _rest(rate: np.ndarray, heads) -> float:
    return max((rate[layer, head] for [(layer, head)] in heads[SHOWN:]), default=0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    run(parser.parse_args().out)
