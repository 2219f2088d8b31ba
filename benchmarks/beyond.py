"""Heads off at the newest token only, at every token of given answers, against other ways of doing it.

The question is the published one (github.com/TianyunYoung/Hallucination-Attribution): what becomes of the log probability of an
answer's token if one head's output is zero while that token is being decided. There a decoder with a cache gives the answer
again, and for each head and token a forward pass of the newest token has zeros in the head's columns of the output
projection's input. All ways run in one process, interleaved; the scores of every timed run are held against a float64 oracle
first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from rich.console import Console
from transformers import DynamicCache, LlamaForCausalLM

import shipsfast

from .against import Oracle, floor_rows, show
from .cases import ANSWER_REAL, AnswerCase
from .cpu import RATE_TOKENS
from .floor import answer_floor_flops, gemm_flops_per_s
from .provenance import ROOT, append, provenance
from .timing import Paths

OURS = "shipsfast"
LOOP = "one head and token at a time (the published code)"
METRIC = "log_prob_diff"
TOLERANCE_NATS = 1e-4  # float32 logits leave a log probability with about 1e-6
SAMPLED_HEADS = 1  # heads per layer of the published loop; its time is extrapolated to all of them
REAL_PROMPTS, REAL_TOKENS = 8, 32

Heads = list[tuple[int, int]]


def ours(model: LlamaForCausalLM, case: AnswerCase) -> shipsfast.ShipsResult:
    return shipsfast.scan(
        model, case.shape.token_ids(), answers=case.answers(), ablation=shipsfast.Ablation("zero", at="end"),
        metric=METRIC, progress=False, rescored=0,
    )  # fmt: skip


def rows_of_all_heads(model: LlamaForCausalLM, case: AnswerCase) -> np.ndarray:
    """One forward pass per token, every head of the model a row of its own, the cache repeated for each."""
    return _scores(model, case, [case.shape.units])


def rows_of_a_layer(model: LlamaForCausalLM, case: AnswerCase) -> np.ndarray:
    """One forward pass per token and layer, the layer's heads as rows."""
    units, heads = case.shape.units, case.shape.heads
    return _scores(model, case, [units[start : start + heads] for start in range(0, len(units), heads)])


def published_loop(model: LlamaForCausalLM, case: AnswerCase) -> np.ndarray:
    """One forward pass per token and head, for SAMPLED_HEADS heads of each layer; the others stay NaN."""
    return _scores(model, case, [[unit] for unit in case.shape.units if unit[1] < SAMPLED_HEADS])


PEERS: dict[str, Callable] = {
    "HF cache, a layer's heads as rows": rows_of_a_layer,
    "HF cache, all heads as rows": rows_of_all_heads,
}


@torch.inference_mode()
def _scores(model: LlamaForCausalLM, case: AnswerCase, passes: list[Heads]) -> np.ndarray:
    """float64 [P, A, L, H] with the heads of each of `passes` as the rows of a forward pass."""
    shape = case.shape
    out = np.full((shape.prompts, case.answer_tokens, shape.layers, shape.heads), np.nan)
    for p, (prompt, answer) in enumerate(zip(shape.token_ids(), case.answers(), strict=True)):
        for a, (newest, cache, base) in enumerate(_decoded(model, prompt, answer)):
            token = answer[a]
            for heads in passes:
                log_probs = _off(model, newest, cache, heads)[:, token]
                for (layer, head), score in zip(heads, (log_probs - base[token]).tolist(), strict=True):
                    out[p, a, layer, head] = score
    return out


def _decoded(
    model: LlamaForCausalLM, prompt: list[int], answer: list[int]
) -> Iterator[tuple[int, DynamicCache, torch.Tensor]]:
    """Of every token of the answer: the newest token before it, the cache of all before that one, and the unablated model's
    log probabilities [V]."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for newest in [prompt[-1], *answer[:-1]]:
        before = _aside(cache)
        logits = model(torch.tensor([[newest]]), past_key_values=cache, use_cache=True).logits[0, -1]
        yield newest, before, torch.log_softmax(logits, -1)


def _off(model: LlamaForCausalLM, newest: int, cache: DynamicCache, heads: Heads) -> torch.Tensor:
    """Log probabilities [heads, V] after the newest token, each row with one of the heads off."""
    cache, size = _aside(cache), model.config.head_dim
    if len(heads) > 1:
        cache.batch_repeat_interleave(len(heads))
    with contextlib.ExitStack() as hooks:
        for layer in sorted({layer for layer, _ in heads}):
            places = [(row, head) for row, (at, head) in enumerate(heads) if at == layer]
            projection = model.model.layers[layer].self_attn.o_proj
            hooks.callback(projection.register_forward_pre_hook(_zero(places, size)).remove)
        ids = torch.full((len(heads), 1), newest)
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.log_softmax(logits, -1)


def _zero(places: list[tuple[int, int]], size: int) -> Callable:
    """places: (row, head) pairs."""

    def hook(_module, args):
        x = args[0].clone()
        for row, head in places:
            x[row, :, head * size : (head + 1) * size] = 0
        return (x, *args[1:])

    return hook


def _aside(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in a cache that can grow by itself: its tensors are replaced then, not written to."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


def run_case(case: AnswerCase, repeats: int, console: Console) -> list[dict]:
    """Check, time and append the rows of one case; returns them."""
    model, shape = case.model(), case.shape
    oracle = Oracle(ours(case.model().double(), case), _by_token, TOLERANCE_NATS)
    record = ours(model, case).record  # and a warm-up
    rates: list[float] = []
    paths = Paths(OURS, [*PEERS, LOOP])
    others = [(name, path, 1.0) for name, path in PEERS.items()]
    others.append((LOOP, published_loop, shape.heads / min(SAMPLED_HEADS, shape.heads)))
    for _ in range(repeats):
        for name, path, times in others:
            before = gemm_flops_per_s(shape, RATE_TOKENS)
            paths.timed(OURS, lambda: ours(model, case), oracle.check)
            rates.append((before + gemm_flops_per_s(shape, RATE_TOKENS)) / 2)
            paths.timed(name, lambda path=path: path(model, case), oracle.check, times)
            paths.paired(name)

    common = provenance("cpu") | {
        "bench": "beyond", "case": case.name, "dtype": str(shape.dtype).removeprefix("torch."), "metric": METRIC,
        "prompts": shape.prompts, "shared_tokens": shape.shared, "own_tokens": shape.own,
        "answer_tokens": case.answer_tokens, "scores": case.num_scores, "rescored": 0,
    }  # fmt: skip
    sampled = {LOOP: f"{shape.layers * SAMPLED_HEADS} heads"}
    rows = floor_rows(
        common,
        paths,
        oracle,
        case.num_scores,
        answer_floor_flops(case),
        rates,
        ours=OURS,
        extrapolated=sampled,
    )
    for row in rows:
        if "failed" not in row:
            own = record if row["path"] == OURS else {}
            row |= {"resolved_backend": own.get("attention_backend"), "layers": own.get("layers")}
    append("beyond", rows)
    show(case.name, case.num_scores, rows, console)
    return rows


def _by_token(scores) -> np.ndarray:
    return scores.by_token if isinstance(scores, shipsfast.ShipsResult) else scores


def run_real(console: Console) -> dict:
    """The wall time of a real chat model along answers of its own: all heads, every token. Not beside anything else."""
    from shipsfast.models.loading import load_model, load_tokenizer
    from tools.real.fetch import smollm2

    file = smollm2()
    model, tokenizer = load_model(str(file), dtype="float32"), load_tokenizer(str(file))
    prompts = (ROOT / "tools" / "real" / "prompts.txt").read_text().splitlines()[:REAL_PROMPTS]
    (texts,) = shipsfast.generate(
        model, prompts, tokenizer, template="chat", max_new_tokens=REAL_TOKENS, progress=False
    )
    answers = [ids[:REAL_TOKENS] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    found = shipsfast.scan(
        model, prompts, tokenizer, answers=answers, template="chat", ablation=shipsfast.Ablation("zero", at="end"),
        metric=METRIC, progress=False, rescored=0,
    )  # fmt: skip
    scores = sum(each.size for each in found.by_token)
    row = provenance("cpu") | {
        "bench": "beyond", "case": ANSWER_REAL, "path": OURS, "dtype": "float32", "metric": METRIC, "prompts": len(prompts),
        "answer_tokens": sum(map(len, answers)), "scores": scores, "rescored": 0,
        "scan_s": found.record["scan_seconds"], "all_s": found.record["seconds"],
        "resolved_backend": found.record["attention_backend"], "layers": found.record["layers"],
    }  # fmt: skip
    append("beyond", [row])
    console.print(
        f"{ANSWER_REAL}: {scores:,} scores in {row['scan_s']:.1f} s, with its checks {row['all_s']:.1f} s"
    )
    return row
