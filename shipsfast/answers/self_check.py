"""Texts held against the model's own forward pass, and tokens that cannot be chosen."""

from __future__ import annotations

from typing import NoReturn

import torch

from ..engine.ablate import dense_rows
from ..engine.head_mask import HeadMask
from ..engine.nonfinite import first_bad
from ..errors import InputError, UnsupportedModelError
from ..models.forward import plain_pass, rounded_to


class NotFinite(Exception):
    """Arguments of `refuse_token`, on their way out of a decoder."""


def refuse_token(generation, group: int, prompt: int, text: list[int]) -> NoReturn:
    """Raises for a row of a Generation whose logits after `text` are not finite, naming where it begins."""
    subject, heads = generation.subject, generation.groups[group]
    mask = HeadMask((heads,), subject.how, generation.values)
    place = first_bad(subject.model, subject.anatomy, [*subject.token_ids[prompt], *text], mask)
    off = "+".join(f"{layer}-{head}" for layer, head in heads)
    raise (InputError if heads else UnsupportedModelError)(
        f"the logits of new token {len(text)} of prompt {prompt} are not numbers, "
        f"{f'with heads {off} off' if heads else 'without any head off'}: "
        f"{place or 'a plain forward pass does not repeat it'}; repair the weights, or use a wider dtype or a smaller scale"
    )


# By how much the logit of a generated token may fall short of the one it had to reach, relative to the spread of the
# logits, before the model is refused.
ALARM_LOGIT = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}


@torch.inference_mode()
def check_generation(generation, row) -> float:
    """Hold the text of a row against one plain forward pass over prompt and text.

    generation: a Generation; row: a Decoded. Every token must be a first choice there, or for draws one of the
    top_k, up to rounding. Returns the largest shortfall of a token's logit, in standard deviations of the logits.
    Raises UnsupportedModelError if it is more than rounding can explain.
    """
    if row is None or not row.tokens:
        return 0.0
    subject, sampling = generation.subject, generation.sampling
    prompt = subject.token_ids[row.prompt]
    mask = HeadMask((generation.groups[row.group],), subject.how, generation.values)
    with dense_rows(subject.model, subject.anatomy, mask):
        logits = plain_pass(subject.model, [[*prompt, *row.tokens[:-1]]])[0, len(prompt) - 1 :].double()
    chosen = logits.gather(-1, torch.tensor(row.tokens, device=logits.device)[:, None])[:, 0]
    rank = (sampling.top_k or logits.shape[-1]) if sampling.do_sample else 1
    needed = logits.topk(rank, -1).values[:, -1]
    # -inf are tokens that the model rules out.
    spread = torch.stack([row[row != -torch.inf].std() for row in logits])
    short = float(((needed - chosen).clamp(min=0) / spread).max())
    if not short <= ALARM_LOGIT.get(rounded_to(subject.model), ALARM_LOGIT[torch.float32]):
        raise UnsupportedModelError(
            f"a plain forward pass over prompt {row.prompt} and its text gives other tokens (a logit falls short by "
            f"{short:.2g} standard deviations): {type(subject.model).__name__} cannot be decoded exactly"
        )
    return short
