"""Does an ablation break the model? What it does to ordinary prompts.

A text that is no refusal is no success if the model says nonsense to everything. So beside the attack success rate
stands, for the same groups of heads and ordinary prompts: how far the next-token distribution moves along the
unablated model's own answer, how many answers are degenerate, and how many stay word for word the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..engine.ablation import HeadMask
from ..engine.decoder import Group
from ..engine.growing_batch import Wavefront
from ..engine.memory_plan import even_slices, make_plan
from ..ops.divergences import kl_rows
from ..ops.prefix_tree import pack
from .queue import Generation

CONTROL_TOKENS = 8


@torch.inference_mode()
def kl_along(
    generation: Generation,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokens: int,
    max_memory: int | None,
) -> np.ndarray:
    """KL(unablated || group off) in nats of each next token along the first `tokens` of each answer, then the mean:
    float64 [G, P].

    generation: the groups; prompts, answers: P lists of token ids, the second what the unablated model says.
    The prefixes of one answer are prompts that share all their tokens, so that they cost what the answer costs.
    """
    subject = generation.subject
    layers = subject.anatomy.num_layers
    ends = [
        (p, [*prompt, *answer[:t]])
        for p, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for t in range(min(tokens, len(answer) + 1))
    ]
    owner, ids = np.array([p for p, _ in ends]), [prefix for _, prefix in ends]
    fork = [min((layer for layer, _ in group), default=layers) for group in generation.groups]
    order = [g for g in np.argsort(fork, kind="stable").tolist() if generation.groups[g]]
    out = np.zeros((len(generation.groups), len(prompts)))
    plan = make_plan(
        subject.anatomy, ids, max(1, len(order)), device=subject.device, dtype=subject.model.dtype,
        max_memory=max_memory,
    )  # fmt: skip
    for some in plan.prompt_groups:
        packed = pack([ids[i] for i in some])
        for part in even_slices(len(order), plan.rows_per_block):
            groups = order[part]
            with Wavefront(
                subject.model, subject.anatomy, packed, backend=subject.backend, chunk_tokens=plan.chunk_tokens,
                head_rows=plan.head_rows, fused=subject.fused,
            ) as wavefront:  # fmt: skip
                _one_block(wavefront, generation, groups, owner[list(some)], out)
    return out / np.bincount(owner)


def _one_block(
    wavefront: Wavefront, generation: Generation, groups: list[int], owner: np.ndarray, out: np.ndarray
) -> None:
    place = wavefront.prompt_place

    def consume(rows: slice, logits: torch.Tensor, base: torch.Tensor) -> None:
        index = torch.arange(len(base), device=logits.device).repeat(len(logits))
        kl_nats = kl_rows(base, logits.flatten(0, 1), index).view(len(logits), -1).cpu().numpy()
        for r in range(max(rows.start, 1), rows.stop):
            np.add.at(out[groups[r - 1]], owner, kl_nats[r - rows.start][place])

    heads: tuple[Group, ...] = ((), *(generation.groups[g] for g in groups))
    wavefront.run(HeadMask(heads, generation.subject.how, generation.values), consume)
