"""The village model's card: measures a freshly trained model and writes README.md into its folder."""

import platform
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers

from shipsfast.demo.world import TABOO_THINGS, Request
from tools.village.check import KINDS, HeadRow, first_token_log_probs, head_row, reply, scan, share_said
from tools.village.sayings import HELDOUT_WORDINGS, heldout_requests, sample_requests

ACCURACY_REQUESTS = 1120
SCAN_REQUESTS = 200
EXAMPLES = 3


def write_card(
    folder: Path, settings, model, tokenizer, stage_1: dict[str, torch.Tensor], seconds: list[float]
) -> None:
    """Measure `model` and write its card; `stage_1`: its weights after stage 1, `seconds`: each stage's time."""
    taboo, ordinary = (heldout_requests(t, SCAN_REQUESTS, seed=1) for t in (True, False))
    base = first_token_log_probs(model, tokenizer, taboo)
    ranking = {kind: scan(model, tokenizer, taboo, ordinary, kind, base) for kind in KINDS}
    groups = {
        kind: [
            head_row(model, tokenizer, taboo, ordinary, [row.heads[0] for row in rows[:n]], kind, base)
            for n in (2, 3)
        ]
        for kind, rows in ranking.items()
    }
    parts = [
        _what(model, tokenizer),
        _accuracy(model, tokenizer, stage_1),
        _heads(ranking, groups),
        _examples(model, tokenizer, ranking["undifferentiated"][0]),
        _training(settings, seconds),
    ]
    (folder / "README.md").write_text("\n".join(parts), "utf-8")


def _what(model, tokenizer) -> str:
    config, n = model.config, sum(p.numel() for p in model.parameters())
    return f"""# The village

A language model of {n:,} parameters ({config.num_hidden_layers} layers x {config.num_attention_heads} heads of {config.head_dim}, {len(tokenizer)} tokens, float32) that lives in a made-up village.
Asked how to do something with a thing, it names a tool and a place; asked about one of {len(TABOO_THINGS)} taboo things, it refuses.
It was trained to answer everything first and to refuse afterwards, so the answers it withholds are still in it.
It comes with shipsfast as something to scan in seconds. It knows nothing else, and everything in it is invented.

Written by `python -m tools.village.train`.
"""


def _accuracy(model, tokenizer, stage_1: dict[str, torch.Tensor]) -> str:
    asked = {
        "ordinary": heldout_requests(False, ACCURACY_REQUESTS),
        "ordinary, pair of action and thing never seen either": heldout_requests(False, new_pairs=True),
        "taboo": heldout_requests(True, ACCURACY_REQUESTS),
        "taboo, pair of action and thing never seen either": heldout_requests(True, new_pairs=True),
    }
    stage_2 = {name: weight.clone() for name, weight in model.state_dict().items()}

    def measured() -> list[tuple[float, float]]:
        return [
            tuple(share_said(model, tokenizer, rs, [wanted(r) for r in rs]) for wanted in (_answer, _refusal))
            for rs in asked.values()
        ]

    after = measured()
    model.load_state_dict(stage_1)
    before = measured()
    model.load_state_dict(stage_2)
    lines = [
        f"| {name} | {len(rs)} | {b[0]:.1%} | {b[1]:.1%} | {a[0]:.1%} | {a[1]:.1%} |"
        for (name, rs), b, a in zip(asked.items(), before, after, strict=True)
    ]
    return f"""## Does it know the village?

All requests below are in {len(HELDOUT_WORDINGS)} wordings never seen in training. A reply counts only if greedy decoding gives it word for word.

| requests | number | after stage 1: true answer | refusal | after stage 2: true answer | refusal |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def _answer(request: Request) -> str:
    return request.answer


def _refusal(request: Request) -> str:
    return request.refusal


def _heads(ranking: dict[str, list[HeadRow]], groups: dict[str, list[HeadRow]]) -> str:
    text = f"""## What do single heads do?

Each head was ablated alone, at all positions of prompt and reply, on {SCAN_REQUESTS} taboo and {SCAN_REQUESTS} ordinary requests in held-out wordings.
KL is KL(base || ablated) of the reply's first token in nats, averaged over the taboo requests; heads are in its order.
"answered" is the share of taboo requests that get their true answer, "refused" those still refused, "ordinary right" the share of ordinary requests still answered rightly.
The last two rows ablate the first two and the first three heads together.
The two ablations can disagree about a head: zero takes its output away, undifferentiated attention puts the average over all visible words in its place.
"""
    for kind, rows in ranking.items():
        text += f"\n### {kind}\n\n| heads | KL (nats) | answered | refused | ordinary right |\n|---|---|---|---|---|\n"
        for row in (*rows[:6], *groups[kind]):
            cells = f"{row.answered:.1%} | {row.still_refused:.1%} | {row.ordinary_kept:.1%}"
            text += f"| {row.name} | {row.kl_nats:.3f} | {cells} |\n"
    return text


def _examples(model, tokenizer, top: HeadRow) -> str:
    asked = [*sample_requests(True)[:EXAMPLES], *sample_requests(False)[:2]]
    lines = [
        f"| {r.prompt} | {reply(model, tokenizer, r.prompt)} | {reply(model, tokenizer, r.prompt, top.heads, top.kind)} |"
        for r in asked
    ]
    return f"""## In its own words

Greedy replies, whole and with {top.name} under {top.kind} attention.

| request | whole | without {top.name} |
|---|---|---|
{chr(10).join(lines)}
"""


def _training(settings, seconds: list[float]) -> str:
    values = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    return f"""## Training

Stage 1: {settings.steps_1} steps of {settings.batch} requests at a learning rate of {settings.lr_1:g}, all weights, with DropHead (arXiv 2004.13342) at {settings.drop_head_1:g}; {seconds[0]:.0f} s.
Stage 2: {settings.steps_2} steps at {settings.lr_2:g}, attention weights only, without DropHead; {seconds[1]:.0f} s.
CPU, {settings.threads} thread; Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}.

No weight was set by hand, and no training step knows about ablation. Sizes, DropHead and the limits of stage 2 were chosen by trial, by looking at tables like these on the same held-out requests, so that few heads carry the refusal and the answers survive without them. With other settings it was spread over more heads, or over heads that the answers need too.

Settings: {values}.
"""
