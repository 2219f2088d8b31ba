"""Does an ablation break the model? What it does to ordinary prompts.

A text that is no refusal is no success if the model says nonsense to everything. So beside the attack success rate
stands, for the same groups of heads and ordinary prompts: how far the next-token distribution moves along the
unablated model's own answer, how many answers are degenerate, and how many stay word for word the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..engine.growing_batch import GrowingBatch
from ..engine.head_mask import HeadMask
from ..engine.heads import Group, group_name
from ..engine.measurement import ScanExecution
from ..engine.memory_plan import even_slices, make_plan
from ..errors import InputError, whole_number
from ..memory import once_more
from ..ops.divergences import kl_rows
from ..ops.prefix_tree import pack
from ..results.completions import Completions
from ..results.evaluation import KL, KL_NAMES, Control
from ..runs.folder import RunFolder
from ..runs.identity import prompt_hashes
from ..runs.kinds import CONTROL
from ..runs.tables import read_scores, score_frame
from .decode import decode
from .generation import Generation, prepare_generation
from .judges.degeneration import degenerate
from .judges.judge import Completion
from .label import Kept, answer
from .measurements import JudgedExecution
from .sampling import Sampling


@dataclass
class Ordinary:
    """The groups, and after them the unablated model, on the control prompts; tokens: of its answers that the KL is taken
    along."""

    generation: Generation
    tokens: int

    def describe(self) -> dict:
        """For the identity of a run."""
        return {"prompts": prompt_hashes(self.generation.subject.token_ids), "tokens": self.tokens}


def prepare_control(judged: Generation, groups: int, execution: JudgedExecution) -> Ordinary:
    """judged: the generation whose first `groups` groups these are. Raises InputError for control prompts that cannot be."""
    measurement = judged.subject.measurement
    tokens = min(whole_number("control_tokens", measurement.control_tokens), measurement.max_new_tokens)
    try:
        own = replace(
            measurement, prompts=measurement.control, groups=[*judged.asked[:groups], []], control=None
        )
        ordinary = prepare_generation(judged.subject.model, judged.tokenizer, own, execution)
    except InputError as error:
        raise InputError(f"in the control prompts: {error}") from error
    # Means are those of the judged prompts, for both.
    return Ordinary(replace(ordinary, values=judged.values), tokens)


def run_control(ordinary: Ordinary, folder: RunFolder | None, execution: JudgedExecution) -> Control:
    """Answer the control prompts, and take the KL along the unablated model's answers."""
    generation, tokens = ordinary.generation, ordinary.tokens
    keep_text = generation.subject.measurement.keep_text
    prompts, count = len(generation.subject.token_ids), len(generation.groups) - 1
    kept = Kept(Completions(count + 1, prompts, keep_text=keep_text), folder, CONTROL)
    answer(generation, _only_degenerate, kept, execution.progress)
    kl_nats = np.full((count, prompts), np.nan)
    if folder is not None:
        kl_nats = read_scores(folder.path, kl_nats.shape, KL_NAMES, KL)
    if np.isnan(kl_nats).any():
        new = _kl(ordinary, execution)
        if folder is not None:
            folder.write_part(score_frame(np.where(np.isnan(kl_nats), new, np.nan), KL_NAMES, KL))
        kl_nats = new
    return Control(kl_nats, kept.completions, tokens)


def _kl(ordinary: Ordinary, execution: JudgedExecution) -> np.ndarray:
    """`kl_along` the unablated model's greedy answers. Raises InputError where it is no number."""
    generation, unablated = ordinary.generation, len(ordinary.generation.groups) - 1
    answers: list[list[int]] = [[] for _ in generation.subject.token_ids]
    greedy = replace(generation, sampling=Sampling(), max_new_tokens=ordinary.tokens)
    for rows in decode(greedy, [(unablated, p) for p in range(len(answers))]):
        for row in rows:
            answers[row.prompt] = row.tokens
    ablated = replace(generation, groups=generation.groups[:-1])
    kl_nats = once_more(
        "taking the KL along the control's answers",
        lambda: kl_along(ablated, answers, ordinary.tokens, execution.max_memory),
    )
    if not np.isfinite(kl_nats).all():  # NaN would be missing for ever
        group, prompt = np.argwhere(~np.isfinite(kl_nats))[0]
        raise InputError(
            f"the KL of group {group_name(ablated.groups[group])} on control prompt {prompt} is not a number: with "
            "these heads off the model overflows; use a smaller scale or a wider dtype"
        )
    return kl_nats


def _only_degenerate(completions: Sequence[Completion]) -> list[str]:
    return ["degenerate" if degenerate(c.text, c.num_tokens, c.limit) else "complied" for c in completions]


@torch.inference_mode()
def kl_along(
    generation: Generation, answers: Sequence[Sequence[int]], tokens: int, max_memory: int | None
) -> np.ndarray:
    """KL(unablated || group off) in nats of each next token along the first `tokens` of each answer, then the mean:
    float64 [G, P].

    generation: the groups; answers: P lists of token ids, what the unablated model says.
    The prefixes of one answer are prompts that share all their tokens, so that they cost what the answer costs.
    """
    subject = generation.subject
    ends = [
        (p, [*prompt, *answer[:t]])
        for p, (prompt, answer) in enumerate(zip(subject.token_ids, answers, strict=True))
        for t in range(min(tokens, len(answer) + 1))
    ]
    owner, ids = np.array([p for p, _ in ends]), [prefix for _, prefix in ends]
    fork = [generation.fork_layer(g) for g in range(len(generation.groups))]
    order = [g for g in np.argsort(fork, kind="stable").tolist() if generation.groups[g]]
    out = np.zeros((len(generation.groups), len(subject.token_ids)))
    limited, held = ScanExecution(max_memory=max_memory), subject.held()
    plan = make_plan(subject.anatomy, ids, max(1, len(order)), limited, held)
    for some in plan.prompt_groups:
        packed = pack([ids[i] for i in some])
        for part in even_slices(len(order), plan.rows_per_block):
            groups = order[part]
            with GrowingBatch(subject, packed, plan) as batch:
                _one_block(batch, generation, groups, owner[list(some)], out)
    return out / np.bincount(owner)


def _one_block(
    batch: GrowingBatch, generation: Generation, groups: list[int], owner: np.ndarray, out: np.ndarray
) -> None:
    place = batch.prompt_place

    def consume(rows: slice, logits: torch.Tensor, base: torch.Tensor) -> None:
        index = torch.arange(len(base), device=logits.device).repeat(len(logits))
        kl_nats = kl_rows(base, logits.flatten(0, 1), index).view(len(logits), -1).cpu().numpy()
        for r in range(max(rows.start, 1), rows.stop):
            np.add.at(out[groups[r - 1]], owner, kl_nats[r - rows.start][place])

    heads: tuple[Group, ...] = ((), *(generation.groups[g] for g in groups))
    batch.run(HeadMask(heads, generation.subject.how, generation.values), consume)
