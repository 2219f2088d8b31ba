"""Run by test_memory_limits.py: each argument is `peak SHAPE LIMIT_MIB`, `ends SHAPE` or `starved`, and gives one line of JSON.

Each in a fork of this process, once everything is imported: peaks are of a whole process, and a limit of its address
space cannot be taken back.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shipsfast
from shipsfast.scans.bench import peak_memory

SHAPES = {
    "wide": dict(hidden_size=768, intermediate_size=768, num_hidden_layers=2, num_attention_heads=12, vocab_size=500),
    "vocabulary": dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=32000,
    ),
    "few": dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, vocab_size=50),
    "tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50),
}  # fmt: skip


def model(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **SHAPES[name])).eval()


def prompts(count: int, shared: int, own: int) -> list[list[int]]:
    draw = random.Random(0)
    token = lambda: draw.randrange(50)
    prefix = [token() for _ in range(shared)]
    return [prefix + [token() for _ in range(own)] for _ in range(count)]


# Many prompts behind a long beginning, and long answers behind a long prompt: (prompts, shared tokens, own, of the answer).
ENDS = {"branches": (64, 1500, 4, 0), "answers": (1, 2500, 4, 200)}


def ends(shape: str) -> dict:
    """Of a scan with heads off at the end only, of a model with few and small heads."""
    shipsfast.scan(model("tiny"), [[1, 2], [1, 3]], progress=False, layers="model", at="end")
    count, shared, own, answer = ENDS[shape]
    subject, ids = model("few"), prompts(count, shared, own + answer)
    answers = [each[shared + own :] for each in ids] if answer else None
    return measured(
        subject,
        [each[: shared + own] for each in ids],
        answers=answers,
        ablation=shipsfast.Ablation(at="end"),
        backend="torch",  # C++ gathers nothing
    )


def peak(name: str, limit_mib: int) -> dict:
    shipsfast.scan(model("tiny"), [[1, 2], [1, 3]], progress=False, layers="model")  # libraries are loaded
    subject, ids = model(name), prompts(16, 20, 40) if name == "wide" else prompts(24, 6, 18)
    return measured(subject, ids, max_memory=limit_mib << 20 if limit_mib else None)


def measured(subject, ids: list[list[int]], **options) -> dict:
    gc.collect()
    with peak_memory(torch.device("cpu")) as found:
        result = shipsfast.scan(subject, ids, progress=False, layers="model", rescored=0, **options)
    return {"peak_mib": found[0], "plan": result.record["plan"]}


def starved() -> dict:
    """A scan whose plan was promised more memory than there is."""
    subject, ids = model("wide"), prompts(16, 4, 24)
    how = dict(progress=False, layers="model", max_memory=1 << 30)
    first = shipsfast.scan(subject, ids, **how)
    gc.collect()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
    second = shipsfast.scan(subject, ids, **how)
    return {
        "difference": float(abs(first.kl - second.kl).max()),
        "first": first.record["plan"],
        "second": second.record["plan"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, *arguments in map(str.split, sys.argv[1:]):
        child = os.fork()
        if not child:
            run = {"peak": lambda name, limit: peak(name, int(limit)), "ends": ends, "starved": starved}[what]
            done = run(*arguments)
            print(json.dumps(done), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{what} {arguments} failed")
